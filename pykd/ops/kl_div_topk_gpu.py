"""The op `kl_div_topk` on NVIDIA GPUs: Triton where it can be imported, else the reference.

No path waits for the device: labels and ids are checked by device-side assertions.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pykd.ops import kl_div_topk as op
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, lib, triton_available
from pykd.ops.kl_div import check_labels, rows_in_memory
from pykd.ops.kl_div_topk_reference import temper

#: Stands for "no entry" in the kernel's lists: above every id.
ABSENT = 2**62


def prepare(
    ids: Tensor, log_probs: Tensor, classes: int, power: float, tail: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the kernel reads: distinct ids, ascending, then ABSENT; their targets; the rest (rows,) with `tail`."""
    keys, order = torch.where(ids < 0, ABSENT, ids).sort(-1)
    weights = torch.where(keys == ABSENT, 0.0, log_probs.double().gather(-1, order).exp())
    new = torch.ones_like(keys)
    new[:, 1:] = keys[:, 1:] != keys[:, :-1]
    place = new.cumsum(-1) - 1
    target = torch.zeros_like(weights).scatter_add_(-1, place, weights)
    distinct = torch.full_like(keys, ABSENT).scatter_(-1, place, keys)
    rest = None
    if tail:
        everything = (distinct != ABSENT).sum(-1) == classes
        rest = torch.where(everything, 0.0, (1 - target.sum(-1)).clamp(min=0)).float()
    return distinct, temper(target, power).float(), rest


def launch_triton(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    losses: Tensor,
    gradient: Tensor | None,
    options: op.Options,
) -> None:
    """Run kernels/kl_div_topk.py."""
    kernel = importlib.import_module("pykd.kernels.kl_div_topk")  # only here, because it imports triton
    numbers = options._asdict()
    teacher = prepare(ids, log_probs, student.shape[1], numbers.pop("power"), numbers.pop("tail"))
    kernel.kl_div_topk(student, *teacher, labels, scale, losses, gradient, **numbers)


def _triton_runs(student: Tensor, log_probs: Tensor, scale: Tensor) -> bool:
    types = student.dtype in DTYPE_CODES and log_probs.dtype in DTYPE_CODES and scale.dtype == torch.float32
    return types and triton_available()


def _run(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    gradient: Tensor | None,
    options: op.Options,
) -> Tensor:
    """Row losses by Triton, after the checks that need the device."""
    check_labels(labels, scale, student.shape[1])
    op.check_ids(ids, scale, student.shape[1])
    losses = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    labels = None if labels is None else labels.contiguous()
    launch_triton(rows_in_memory(student), ids, log_probs, labels, scale.contiguous(), losses, gradient, options)
    return losses


def _cuda(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    need_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    if not _triton_runs(student, log_probs, scale):
        return op.reference(student, ids, log_probs, labels, scale, need_grad, *options)
    gradient = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    given = gradient if need_grad else None
    return _run(student, ids, log_probs, labels, scale, given, op.Options(*options)), gradient


def _cuda_in_place(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, *options: Any
) -> Tensor:
    if not _triton_runs(student, log_probs, scale):
        return op.reference_in_place(student, ids, log_probs, labels, scale, *options)
    return _run(student, ids, log_probs, labels, scale, student, op.Options(*options))


lib.impl("kl_div_topk", _cuda, "CUDA")  # type: ignore[no-untyped-call]
lib.impl("kl_div_topk_", _cuda_in_place, "CUDA")  # type: ignore[no-untyped-call]
TABLE += [
    Route("kl_div_topk", "cuda", "float32, bfloat16, float16 with Triton", "triton"),
    Route("kl_div_topk", "cuda", "otherwise", "reference"),
]
