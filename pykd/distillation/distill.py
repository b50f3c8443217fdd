"""`distill`: train a student with its teacher in the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.distillation.checks import common_classes
from pykd.distillation.logits import logits_loss
from pykd.distillation.offline import Offline, check_offline
from pykd.distillation.teacher import Teacher
from pykd.distillation.teacher_cache import TeacherCache
from pykd.errors import nearest
from pykd.models.adapter import logits
from pykd.training.config import TrainConfig
from pykd.training.guard import Guard
from pykd.training.labels import check_batch, predicts_next
from pykd.training.loop import fit
from pykd.training.record import add_record
from pykd.training.source import Batch, Loader
from pykd.training.watch import Validate
from pykd.training.watched import watched

Model = TypeVar("Model", bound=nn.Module)
Method = Callable[..., Tensor]

#: Name -> loss(student_logits, teacher_logits, labels, *, temperature, alpha, shift).
METHODS: dict[str, Method] = {
    "logits": logits_loss,
}


def distill(
    student: Model,
    teacher: nn.Module | TeacherCache,
    data: DataBundle | Loader,
    *,
    method: str | Method = "logits",
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
    log_file: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    label: str = "distill",
) -> Model:
    """Train ``student`` in place to follow ``teacher`` (Hinton et al. 2015); returns it, recorded in ``pykd_report``.

    The loss is ``alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross entropy``. method: a name in METHODS
    or a function like theirs. The teacher runs in eval mode without gradients; when the run has several epochs over a
    fixed training set and all its logits fit in ``cache_bytes``, they are computed once. A :class:`TeacherCache` in the
    teacher's place says what :func:`cache_teacher` kept of it; the loss is then ``kd_loss_topk``. student_tokenizer,
    teacher_tokenizer: if both are given they must be equal, and the widths of the logits may then differ by padding.
    The other options are those of :class:`pykd.training.TrainConfig` and :func:`pykd.training.fit`; a ``guard`` without
    ``validate`` guards the accuracy on the held-out split, and knows the teacher's.

    Raises ValueError for class counts or tokenizers that do not fit together, NaN in either model's weights, or an
    unknown method; DataError for labels out of range.

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
    source: Teacher | Offline
    if isinstance(teacher, TeacherCache):
        classes = check_offline(student, teacher, method=method, temperature=temperature)
        source, cached, teacher_class = Offline(teacher, data), True, teacher.manifest["teacher"]["class"]
        term: Method = source.loss
    else:
        term, source, teacher_class = _resolve(method), Teacher(teacher, data), type(teacher).__name__
        classes = common_classes(
            student, teacher, student_tokenizer=student_tokenizer, teacher_tokenizer=teacher_tokenizer
        )
        cached = source.remember(config, cache_bytes=cache_bytes, progress=progress)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        check_batch(batch, classes=classes)
        wanted = source(batch)
        wanted = wanted[..., :classes] if isinstance(wanted, Tensor) else wanted
        scores = logits(model, batch)[..., :classes]
        shift = predicts_next(model)
        return term(scores, wanted, batch["labels"], temperature=temperature, alpha=alpha, shift=shift), {}

    settings = {"temperature": temperature, "alpha": alpha}
    validate, guard = watched(validate, guard, data, teacher=teacher if isinstance(teacher, nn.Module) else None)
    with source.frozen():
        history = fit(
            student,
            source.data,
            loss_fn,
            config,
            validate=validate,
            guard=guard,
            settings=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            log_file=log_file,
            progress=progress,
            label=label,
        )
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    facts = {"teacher": teacher_class, "classes": classes, "teacher_cached": cached}
    parameters = config.to_dict() | settings
    add_record(student, stage="distill", method=name, parameters=parameters, **facts, **history.summary())
    return student


def _resolve(method: str | Method) -> Method:
    if callable(method):
        return method
    if method not in METHODS:
        raise ValueError(nearest("method", method, METHODS))
    return METHODS[method]
