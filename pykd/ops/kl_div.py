"""The op `kl_div`: divergence of softened distributions mixed with cross entropy, and its gradient, in one pass.

`torch.ops.pykd.kl_div` returns the loss of each row and the gradient by the student's logits, computed together
because they share every exponential; backward only scales that gradient. `kl_div_` writes the gradient over the
logits. The public functions, with their checks and reductions, are in `pykd.ops.kd_loss`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.ops import memory
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, dtype_code, lib, native, num_threads
from pykd.ops.kl_div_reference import DIRECTIONS, kl_div_reference
from pykd.ops.row_loss import register_autograd

#: Direction -> its code in csrc/ops.h.
DIRECTION_CODES = {name: code for code, name in enumerate(DIRECTIONS)}


class Options(NamedTuple):
    """The numbers of the loss, in the order of the op's schema."""

    temperature: float
    direction: str
    beta: float
    kl_weight: float
    ce_weight: float
    label_smoothing: float


_OPTIONS = "float temperature, str direction, float beta, float kl_weight, float ce_weight, float label_smoothing"
lib.define(  # type: ignore[no-untyped-call]
    f"kl_div(Tensor student, Tensor teacher, Tensor? labels, Tensor scale, bool need_grad, {_OPTIONS}) "
    "-> (Tensor, Tensor)"
)
lib.define(f"kl_div_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor scale, {_OPTIONS}) -> Tensor")  # type: ignore[no-untyped-call]


def check_labels(labels: Tensor | None, scale: Tensor, classes: int) -> None:
    """ValueError for a label outside [0, classes) in a row that counts; on CUDA a device-side assertion instead."""
    if labels is None:
        return
    valid = ((labels >= 0) & (labels < classes)) | (scale == 0)
    if labels.is_cuda:  # the host must not wait for the answer
        torch._assert_async(valid.all(), f"kd_loss: a label is outside [0, {classes}) and is not ignore_index")
    elif not bool(valid.all()):
        raise bad_label(labels, int((~valid).nonzero()[0]), classes)


def bad_label(labels: Tensor, row: int, classes: int) -> ValueError:
    """The error for a label that is no class."""
    return ValueError(
        f"labels must lie in [0, {classes}) or equal ignore_index, but position {row} holds {int(labels[row])}: "
        "correct the label or mask the position"
    )


def reference(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, need_grad: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    """The op by the reference."""
    check_labels(labels, scale, student.shape[1])
    losses, gradient = kl_div_reference(student, teacher, labels, scale, *options)
    return losses, gradient if need_grad else student.new_empty(0)


def _native_runs(student: Tensor, teacher: Tensor, scale: Tensor) -> bool:
    types = student.dtype in DTYPE_CODES and teacher.dtype in DTYPE_CODES
    return native is not None and types and scale.dtype == torch.float32


def rows_in_memory(logits: Tensor) -> Tensor:
    """The logits with adjacent classes; rows may be any distance apart, so most slices need no copy."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _run_native(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, gradient: Tensor | None, options: Options
) -> Tensor:
    """Row losses by the native kernel; the gradient goes into `gradient` (contiguous) unless that is None."""
    if options.kl_weight == 0:
        teacher = student  # what the teacher holds, NaN included, does not count
    student, teacher, scale = rows_in_memory(student), rows_in_memory(teacher), scale.contiguous()
    labels = labels.contiguous() if labels is not None else None
    rows, classes = student.shape
    losses = torch.empty(rows, dtype=torch.float32)
    failed = native.kl_div(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(),
        scale=scale.data_ptr(),
        losses=losses.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(),
        rows=rows,
        student_classes=classes,
        teacher_classes=teacher.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        student_dtype=dtype_code(student),
        teacher_dtype=dtype_code(teacher),
        direction=DIRECTION_CODES[options.direction],
        beta=options.beta,
        temperature=options.temperature,
        kl_weight=options.kl_weight,
        ce_weight=options.ce_weight,
        label_smoothing=options.label_smoothing,
        threads=num_threads(),
    )
    if failed >= 0:
        assert labels is not None
        raise bad_label(labels, failed, classes)
    return losses


def _cpu(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, need_grad: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    if not _native_runs(student, teacher, scale):
        return reference(student, teacher, labels, scale, need_grad, *options)
    gradient = memory.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    losses = _run_native(student, teacher, labels, scale, gradient if need_grad else None, Options(*options))
    return losses, gradient


def _cpu_in_place(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *options: Any) -> Tensor:
    if not _native_runs(student, teacher, scale):
        return reference_in_place(student, teacher, labels, scale, *options)
    return _run_native(student, teacher, labels, scale, student, Options(*options))


def reference_in_place(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *options: Any) -> Tensor:
    """The in-place op by the reference."""
    losses, gradient = reference(student, teacher, labels, scale, True, *options)
    student.copy_(gradient)
    return losses


lib.impl("kl_div", reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
lib.impl("kl_div_", reference_in_place, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
lib.impl("kl_div", _cpu, "CPU")  # type: ignore[no-untyped-call]
lib.impl("kl_div_", _cpu_in_place, "CPU")  # type: ignore[no-untyped-call]
TABLE += [
    Route("kl_div", "cpu", "float32, bfloat16, float16 with the native module", "native"),
    Route("kl_div", "cpu", "otherwise", "reference"),
]


@torch.library.register_fake("pykd::kl_div", lib=lib)  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, need_grad: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    return torch.empty_like(scale, memory_format=torch.contiguous_format), gradient


@torch.library.register_fake("pykd::kl_div_", lib=lib)  # type: ignore[untyped-decorator]
def _fake_in_place(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


register_autograd("kl_div")
