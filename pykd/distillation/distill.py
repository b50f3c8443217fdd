"""`distill`: train a student with its teacher in the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.distillation.assemble import assemble
from pykd.distillation.methods import METHODS, Methods, Weighted, resolve
from pykd.distillation.offline import Offline, check_offline
from pykd.distillation.sequence import teacher_writes
from pykd.distillation.teacher import Teacher, first_batch
from pykd.distillation.teacher_cache import TeacherCache
from pykd.distillation.terms import Terms
from pykd.models.adapter import auxiliary_losses, call, logits_of, unwrap
from pykd.training.config import TrainConfig
from pykd.training.finetune import with_auxiliary
from pykd.training.guard import Guard
from pykd.training.labels import check_batch, predicts_next
from pykd.training.loop import fit
from pykd.training.pruner import Pruner
from pykd.training.record import add_record
from pykd.training.source import Batch, Loader
from pykd.training.watch import Validate
from pykd.training.watched import watched

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Any]]]

__all__ = ["METHODS", "distill"]


def distill(
    student: Model,
    teacher: nn.Module | TeacherCache | Sequence[nn.Module],
    data: DataBundle | Loader,
    *,
    method: Methods = "logits",
    teacher_weights: Sequence[float] | None = None,
    teacher_scheme: str | None = None,
    temperature: float = 4.0,
    alpha: float = 0.5,
    epochs: float = 1.0,
    batch_size: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.05,
    clip_norm: float | None = 1.0,
    autocast: str | None = None,
    max_steps: int | None = None,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    group_by_length: bool = False,
    seed: int = 0,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    cache_bytes: int = 256 * 2**20,
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
    label: str = "distill",
) -> Model:
    """Train ``student`` in place to follow ``teacher`` (Hinton et al. 2015); returns it, recorded in ``pykd_report``.

    The loss of "logits" is ``alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross entropy``. method: a name
    in METHODS, a function like ``logits_loss``, a :class:`Method`, or several with their weights in the sum:
    ``{"logits": 1.0, "hidden": 0.5, "contrastive": {"weight": 0.1, "sharpness": 0.2}}``. "hidden" and "attention"
    follow the map of layers that ``derive`` left on the student (``match_layers``); what projections learn is dropped.
    "sequence" replaces the training targets by what the (first) teacher writes; "on_policy" lets the student write.

    teacher: one, or several whose terms are averaged by ``teacher_weights`` (equal by default). teacher_scheme: "w8a8",
    "w8a16" or "w4a16" runs quantized copies of the teachers, in less memory. Teachers run in eval mode without
    gradients; when the run has several epochs over a fixed training set and all logits fit in ``cache_bytes``, they are
    computed once. A :class:`TeacherCache` in the teacher's place says what :func:`cache_teacher` kept of it; the loss
    is then ``kd_loss_topk``, and options that need the teacher itself are refused. student_tokenizer,
    teacher_tokenizer: if both are given they must be equal, and the widths of the logits may then differ by padding.
    The other options are those of :class:`pykd.training.TrainConfig` and :func:`pykd.training.fit`, among them
    ``prune``, sparsity that rises meanwhile (:class:`pykd.Gradual`); a ``guard`` without ``validate`` guards the
    accuracy on the held-out split, and knows the teacher's.

    Raises ValueError for class counts, vocabularies or layers that do not fit together, NaN in either model's weights,
    or an unknown method; DataError for labels out of range.

    >>> from torch import nn, randn, randint
    >>> batches = [{"pixel_values": randn(8, 4), "labels": randint(3, (8,))} for _ in range(5)]
    >>> student = distill(nn.Linear(4, 3), nn.Linear(4, 3), batches, epochs=2, progress=False)
    >>> student.pykd_report[-1]["steps"]
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
    methods, settings = resolve(method), {"temperature": temperature, "alpha": alpha}
    source: Teacher | Offline
    if isinstance(teacher, TeacherCache):
        classes = check_offline(
            student,
            teacher,
            methods=methods,
            temperature=temperature,
            teacher_weights=teacher_weights,
            teacher_scheme=teacher_scheme,
            student_tokenizer=student_tokenizer,
            teacher_tokenizer=teacher_tokenizer,
        )
        source, cached, names = Offline(teacher, data), True, [teacher.manifest["teacher"]["class"]]
        loss_fn, terms = _offline_loss(source, classes, temperature, alpha), None
    else:
        terms = assemble(
            student,
            teacher,
            methods,
            teacher_weights=teacher_weights,
            teacher_scheme=teacher_scheme,
            temperature=temperature,
            alpha=alpha,
            student_tokenizer=student_tokenizer,
            teacher_tokenizer=teacher_tokenizer,
        )
        classes, teachers, shares = terms.classes, terms.teachers, terms.shares
        names = [type(each).__name__ for each in teachers]
        source = Teacher(teachers, _written(methods, teachers[0], data, checkpoint_dir, progress))
        cached = terms.logits_only and source.remember(config, cache_bytes=cache_bytes, progress=progress)
        loss_fn = _loss(terms, source, classes)
        settings |= _settings(methods, shares, teacher_scheme)
    its = None if isinstance(teacher, TeacherCache) else teachers[0]
    validate, guard = watched(validate, guard, data, teacher=its, every=validate_steps)
    with source.frozen(), terms.ready(first_batch(data, student), seed=seed) if terms else contextlib.nullcontext():
        history = fit(
            student,
            source.data,
            loss_fn,
            config,
            modules=terms.modules if terms else None,
            validate=validate,
            guard=guard,
            prune=prune,
            settings=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            log_file=log_file,
            find_unused_parameters=terms is not None and not terms.through_head,
            progress=progress,
            label=label,
        )
    facts = {"teacher": " + ".join(names), "classes": classes, "teacher_cached": cached}
    parameters = config.to_dict() | settings
    name = " + ".join(each.name for each in methods)
    add_record(student, stage="distill", method=name, parameters=parameters, **facts, **history.summary())
    return student


def _loss(terms: Terms, source: Teacher, classes: int) -> Loss:
    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        check_batch(batch, classes=classes)
        return terms(model, batch, source.known(batch))

    return loss_fn


def _offline_loss(source: Offline, classes: int, temperature: float, alpha: float) -> Loss:
    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        check_batch(batch, classes=classes)
        kept, output = source(batch), call(model, batch)
        scores, shift = logits_of(model, output)[..., :classes], predicts_next(unwrap(model))
        loss = source.loss(scores, kept, batch["labels"], temperature=temperature, alpha=alpha, shift=shift)
        return with_auxiliary(loss, auxiliary_losses(output))

    return loss_fn


def _settings(methods: Sequence[Weighted], shares: Sequence[float], scheme: str | None) -> dict[str, Any]:
    """What else decides the loss, where it is not the default: a checkpoint of other settings is refused."""
    plain = len(methods) == 1 and methods[0].weight == 1.0 and methods[0].method.compares == "logits"
    found: dict[str, Any] = {}
    if not plain:
        found["method"] = {each.name: {"weight": each.weight, **each.method.options} for each in methods}
    if len(shares) > 1:
        found["teacher_weights"] = list(shares)
    return found if scheme is None else {**found, "teacher_scheme": scheme}


def _written(
    methods: Sequence[Weighted],
    teacher: nn.Module,
    data: DataBundle | Loader,
    checkpoint_dir: str | Path | None,
    progress: bool | None,
) -> DataBundle | Loader:
    """The data, with the teacher's sequences for targets where a method trains on them."""
    for each in methods:
        if each.method.compares == "teacher's sequences":
            beams = int(each.method.options.get("beams", 4))
            path = None if checkpoint_dir is None else Path(checkpoint_dir) / "teacher_sequences.json"
            return teacher_writes(teacher, data, beams=beams, path=path, progress=progress)
    return data
