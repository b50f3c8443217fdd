"""The op `kl_div` on NVIDIA GPUs: CUDA clusters for wide rows, else Triton, else the CUDA library, else the reference.

`choose` decides from types, sizes and the device's compute capability alone. No path waits for the device: labels are
checked by a device-side assertion, sizes and strides are known on the host.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykd.ops import kl_div as op
from pykd.ops.dispatch import (
    DTYPE_CODES,
    TABLE,
    Route,
    check_cuda,
    cuda_library,
    cuda_stream,
    dtype_code,
    lib,
    triton_available,
)

#: Rows of more classes than this no longer stay in L2 between a kernel's sweeps, so they go to the CUDA kernel that
#: keeps each in the shared memory of a thread-block cluster (compute capability 9.0 or newer).
WIDE_CLASSES = 65536

#: Writes row losses and, unless it is None, the gradient: (student, teacher, labels, scale, losses, gradient, options).
Launcher = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, op.Options], None]


def launch_triton(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    losses: Tensor,
    gradient: Tensor | None,
    options: op.Options,
) -> None:
    """Run kernels/kl_div.py."""
    kernel = importlib.import_module("pykd.kernels.kl_div")  # only here, because it imports triton
    numbers = options._asdict() | {"direction": op.DIRECTION_CODES[options.direction]}
    kernel.kl_div(student, teacher, labels, scale, losses, gradient, **numbers)


def launch_cuda(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    losses: Tensor,
    gradient: Tensor | None,
    options: op.Options,
) -> None:
    """Run csrc/cuda/kl_div.cu, which picks between one block and one cluster of blocks per row."""
    library = cuda_library()
    assert library is not None
    pointers = [None if x is None else x.data_ptr() for x in (student, teacher, labels, scale, losses, gradient)]
    sizes = [*student.shape, teacher.shape[1], student.stride(0), teacher.stride(0)]
    codes = [dtype_code(student), dtype_code(teacher), op.DIRECTION_CODES[options.direction]]
    numbers = [options.beta, options.temperature, options.kl_weight, options.ce_weight, options.label_smoothing]
    with torch.cuda.device(student.device):
        code = library.pykd_cuda_kl_div(
            *map(ctypes.c_void_p, pointers),
            *map(ctypes.c_int64, sizes),
            *map(ctypes.c_int, codes),
            *map(ctypes.c_double, numbers),
            ctypes.c_void_p(cuda_stream(student.device)),
        )
    check_cuda(code, "kl_div")


def choose(
    classes: int,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    triton: bool,
    cuda: bool,
) -> str:
    """Which of "cuda", "triton", "reference" serves rows of `classes` (the wider side's), by what is installed."""
    if student_dtype not in DTYPE_CODES or teacher_dtype not in DTYPE_CODES:
        return "reference"
    clusters = capability >= (9, 0) and classes > WIDE_CLASSES and student_dtype == teacher_dtype
    if cuda and (clusters or not triton):
        return "cuda"
    return "triton" if triton else "reference"


def _launcher(student: Tensor, teacher: Tensor, scale: Tensor) -> Launcher | None:
    if scale.dtype != torch.float32:
        return None
    name = choose(
        max(student.shape[1], teacher.shape[1]),
        student.dtype,
        teacher.dtype,
        torch.cuda.get_device_capability(student.device),
        triton=triton_available(),
        cuda=cuda_library() is not None,
    )
    return {"cuda": launch_cuda, "triton": launch_triton, "reference": None}[name]


def run(
    launcher: Launcher,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    gradient: Tensor | None,
    options: op.Options,
) -> Tensor:
    """Row losses by one launcher, after the checks that need the device."""
    op.check_labels(labels, scale, student.shape[1])
    if options.kl_weight == 0:
        teacher = student  # what the teacher holds, NaN included, does not count
    losses = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
    labels = None if labels is None else labels.contiguous()
    student, teacher = op.rows_in_memory(student), op.rows_in_memory(teacher)
    launcher(student, teacher, labels, scale.contiguous(), losses, gradient, options)
    return losses


def _cuda(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, need_grad: bool, *options: Any
) -> tuple[Tensor, Tensor]:
    launcher = _launcher(student, teacher, scale)
    if launcher is None:
        return op.reference(student, teacher, labels, scale, need_grad, *options)
    gradient = torch.empty(student.shape if need_grad else (0,), dtype=student.dtype, device=student.device)
    given = gradient if need_grad else None
    return run(launcher, student, teacher, labels, scale, given, op.Options(*options)), gradient


def _cuda_in_place(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, *options: Any) -> Tensor:
    launcher = _launcher(student, teacher, scale)
    if launcher is None:
        return op.reference_in_place(student, teacher, labels, scale, *options)
    return run(launcher, student, teacher, labels, scale, student, op.Options(*options))


lib.impl("kl_div", _cuda, "CUDA")  # type: ignore[no-untyped-call]
lib.impl("kl_div_", _cuda_in_place, "CUDA")  # type: ignore[no-untyped-call]
TABLE += [
    Route(
        "kl_div",
        "cuda",
        f"more than {WIDE_CLASSES} classes, student and teacher of one type, compute capability 9.0 or newer, "
        "with the CUDA library",
        "cuda",
    ),
    Route("kl_div", "cuda", "other float32, bfloat16, float16 with Triton", "triton"),
    Route("kl_div", "cuda", "float32, bfloat16, float16 with the CUDA library, without Triton", "cuda"),
    Route("kl_div", "cuda", "otherwise", "reference"),
]
