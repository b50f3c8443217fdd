"""Supervised training: labels alone, no teacher. How a teacher is made, and the baseline of every distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from pykd.data.bundle import DataBundle
from pykd.models.adapter import auxiliary_losses, call, logits_of, num_classes
from pykd.training.config import TrainConfig
from pykd.training.guard import Guard
from pykd.training.labels import IGNORED, check_batch, check_shapes, predicts_next
from pykd.training.loop import fit
from pykd.training.pruner import Pruner
from pykd.training.record import add_record, require_finite_weights
from pykd.training.source import Batch, Loader
from pykd.training.watch import Validate
from pykd.training.watched import watched

Model = TypeVar("Model", bound=nn.Module)


def finetune(
    model: Model,
    data: DataBundle | Loader,
    *,
    epochs: float = 1.0,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.05,
    clip_norm: float | None = 1.0,
    label_smoothing: float = 0.0,
    autocast: str | None = None,
    max_steps: int | None = None,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    group_by_length: bool = False,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_steps: int | None = None,
    keep_checkpoints: int = 1,
    validate: Validate | None = None,
    validate_steps: int | None = None,
    guard: Guard | None = None,
    prune: Pruner | None = None,
    log_file: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    label: str = "finetune",
) -> Model:
    """Train ``model`` on labels by cross entropy, in place; returns it with a record in ``model.pykd_report``.

    Labels are class numbers 0..classes-1, one a row or one a position; -100 is ignored, and the loss of a batch in
    which nothing else stands is 0. Causal language models (their logits of position i) are scored against label i + 1.
    The other options are those of :class:`TrainConfig` and :func:`fit`, among them ``prune``, sparsity that rises
    meanwhile; a ``guard`` without ``validate`` guards the accuracy on the held-out split.

    Raises DataError for labels out of range, ValueError for NaN or infinite weights and options out of range.

    >>> from torch import nn, randn, randint
    >>> batches = [{"pixel_values": randn(8, 4), "labels": randint(3, (8,))} for _ in range(5)]
    >>> finetune(nn.Linear(4, 3), batches, epochs=2, progress=False).pykd_report[-1]["steps"]
    10
    """
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        clip_norm=clip_norm,
        autocast=autocast,
        seed=seed,
        max_steps=max_steps,
        checkpoint_steps=checkpoint_steps,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        group_by_length=group_by_length,
        validate_steps=validate_steps,
        keep_checkpoints=keep_checkpoints,
    )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is a share, 0..1, got {label_smoothing!r}")
    require_finite_weights(model, "model")
    classes = num_classes(model)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        return _losses(model, batch, classes=classes, label_smoothing=label_smoothing)

    settings = {"label_smoothing": label_smoothing}
    validate, guard = watched(validate, guard, data, every=validate_steps)
    history = fit(
        model,
        data,
        loss_fn,
        config,
        validate=validate,
        guard=guard,
        prune=prune,
        settings=settings,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        log_file=log_file,
        progress=progress,
        label=label,
    )
    parameters = config.to_dict() | settings
    add_record(model, stage="finetune", method="cross_entropy", parameters=parameters, **history.summary())
    return model


def label_loss(model: nn.Module, batch: Batch, *, classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of a batch's labels and the model's own losses, under the rules of `finetune`; a scalar.

    Raises DataError for labels that are missing, out of range, or do not go with the logits.
    """
    return _losses(model, batch, classes=classes, label_smoothing=label_smoothing)[0]


def _losses(model: nn.Module, batch: Batch, *, classes: int, label_smoothing: float) -> tuple[Tensor, dict[str, Any]]:
    check_batch(batch, classes=classes)
    output, labels = call(model, batch), batch["labels"]
    scores = logits_of(model, output)
    check_shapes(scores, labels)
    if predicts_next(model):
        scores, labels = scores[:, :-1], labels[:, 1:]
    flat, labels = scores.float().flatten(0, -2), labels.flatten()
    options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
    total = F.cross_entropy(flat, labels, reduction="sum", **options)
    loss = total / (labels != IGNORED).sum().clamp_min(1)  # 0, and not 0 / 0, where no label counts
    return with_auxiliary(loss, auxiliary_losses(output))


def with_auxiliary(loss: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """A task's loss with a model's own losses added, and those by name, to be noted.

    >>> import torch
    >>> with_auxiliary(torch.tensor(1.0), {"load": torch.tensor(0.5)})
    (tensor(1.5000), {'load': tensor(0.5000)})
    """
    return sum(own.values(), start=loss), {name: value.detach() for name, value in own.items()}
