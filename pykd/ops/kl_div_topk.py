"""The op `kl_div_topk`: divergence from the classes that a teacher kept, mixed with cross entropy, and its gradient.

`torch.ops.pykd.kl_div_topk` returns the loss of each row and the gradient by the student's logits, computed together;
`kl_div_topk_` writes the gradient over the logits. The public function is in `pykd.ops.kd_loss_topk`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.ops import memory
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, dtype_code, lib, native, num_threads
from pykd.ops.kl_div import bad_label, check_labels, rows_in_memory
from pykd.ops.kl_div_topk_reference import kl_div_topk_reference
from pykd.ops.row_loss import register_autograd


class Options(NamedTuple):
    """The numbers of the loss, in the order of the op's schema."""

    temperature: float  # of the student
    power: float  # the target is w^power with the sum of w
    tail: bool  # the classes that are not kept are one more class
    kl_weight: float
    ce_weight: float
    label_smoothing: float


_OPTIONS = "float temperature, float power, bool tail, float kl_weight, float ce_weight, float label_smoothing"
_TEACHER = "Tensor ids, Tensor log_probs, Tensor? labels, Tensor scale"
lib.define(f"kl_div_topk(Tensor student, {_TEACHER}, bool need_grad, {_OPTIONS}) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
lib.define(f"kl_div_topk_(Tensor(a!) student, {_TEACHER}, {_OPTIONS}) -> Tensor")  # type: ignore[no-untyped-call]


def check_ids(ids: Tensor, scale: Tensor, classes: int) -> None:
    """ValueError for an id outside [-1, classes) in a row that counts; on CUDA a device-side assertion instead."""
    valid = ((ids >= -1) & (ids < classes)).all(-1) | (scale == 0)
    if ids.is_cuda:  # the host must not wait for the answer
        torch._assert_async(valid.all(), f"kd_loss_topk: a teacher id is outside [0, {classes}) and is not -1")
    elif not bool(valid.all()):
        raise _bad_id(ids, int((~valid).nonzero()[0]), classes)


def _bad_id(ids: Tensor, row: int, classes: int) -> ValueError:
    wrong = ids[row][(ids[row] < -1) | (ids[row] >= classes)]
    return ValueError(
        f"teacher_ids must lie in [0, {classes}), or be -1 for no entry, but position {row} holds {int(wrong[0])}: "
        "the teacher's vocabulary must be the student's"
    )


def reference(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    need_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The op by the reference."""
    check_labels(labels, scale, student.shape[1])
    check_ids(ids, scale, student.shape[1])
    losses, gradient = kl_div_topk_reference(student, ids, log_probs, labels, scale, *options)
    return losses, gradient if need_grad else student.new_empty(0)


def reference_in_place(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, *options: Any
) -> Tensor:
    """The in-place op by the reference."""
    losses, gradient = reference(student, ids, log_probs, labels, scale, True, *options)
    student.copy_(gradient)
    return losses


def _native_runs(student: Tensor, log_probs: Tensor, scale: Tensor) -> bool:
    types = student.dtype in DTYPE_CODES and log_probs.dtype in DTYPE_CODES
    return native is not None and types and scale.dtype == torch.float32


def _run_native(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    gradient: Tensor | None,
    options: Options,
) -> Tensor:
    """Row losses by the native kernel; the gradient goes into `gradient` (contiguous) unless that is None."""
    student, ids, log_probs = rows_in_memory(student), ids.contiguous(), log_probs.contiguous()
    scale = scale.contiguous()
    labels = labels.contiguous() if labels is not None else None
    rows, classes = student.shape
    losses = torch.empty(rows, dtype=torch.float32)
    failed = native.kl_div_topk(
        student=student.data_ptr(),
        ids=ids.data_ptr(),
        log_probs=log_probs.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(),
        scale=scale.data_ptr(),
        losses=losses.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(),
        rows=rows,
        classes=classes,
        kept=ids.shape[1],
        student_stride=student.stride(0),
        student_dtype=dtype_code(student),
        teacher_dtype=dtype_code(log_probs),
        threads=num_threads(),
        **options._asdict(),
    )
    if failed >= rows:
        raise _bad_id(ids, failed - rows, classes)
    if failed >= 0:
        assert labels is not None
        raise bad_label(labels, failed, classes)
    return losses


def _cpu(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    need_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    if not _native_runs(student, log_probs, scale):
        return reference(student, ids, log_probs, labels, scale, need_grad, *options)
    gradient = memory.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    given = gradient if need_grad else None
    return _run_native(student, ids, log_probs, labels, scale, given, Options(*options)), gradient


def _cpu_in_place(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, *options: Any
) -> Tensor:
    if not _native_runs(student, log_probs, scale):
        return reference_in_place(student, ids, log_probs, labels, scale, *options)
    return _run_native(student, ids, log_probs, labels, scale, student, Options(*options))


lib.impl("kl_div_topk", reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
lib.impl("kl_div_topk_", reference_in_place, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
lib.impl("kl_div_topk", _cpu, "CPU")  # type: ignore[no-untyped-call]
lib.impl("kl_div_topk_", _cpu_in_place, "CPU")  # type: ignore[no-untyped-call]
TABLE += [
    Route("kl_div_topk", "cpu", "float32, bfloat16, float16 with the native module", "native"),
    Route("kl_div_topk", "cpu", "otherwise", "reference"),
]


@torch.library.register_fake("pykd::kl_div_topk", lib=lib)  # type: ignore[untyped-decorator]
def _fake(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    need_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    return torch.empty_like(scale, memory_format=torch.contiguous_format), gradient


@torch.library.register_fake("pykd::kl_div_topk_", lib=lib)  # type: ignore[untyped-decorator]
def _fake_in_place(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, *options: Any
) -> Tensor:
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


register_autograd("kl_div_topk")
