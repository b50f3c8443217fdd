"""The op `linear_4bit` on NVIDIA GPUs: the CUDA kernel for few rows, else Triton, else the reference."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from pykd.ops.activation import activate
from pykd.ops.dispatch import DTYPE_CODES, check_cuda, cuda_library, cuda_stream, triton_available
from pykd.ops.int4_r16 import code_number, codebook
from pykd.ops.linear_4bit_reference import INPUTS, reference, rounded

#: Up to this many rows the CUDA kernel streams the weight once per call; beyond, Triton's tiles reuse it.
CUDA_ROWS = 8


def cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    out_features: int,
    group_size: int,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    """The op on an NVIDIA GPU."""
    library = cuda_library()
    if scales is not None and scales.dtype != torch.float16:
        library = None  # its kernels read float16
    if scales is None or x.dtype not in DTYPE_CODES or not (library or triton_available()):
        return reference(x, qweight, scales, zeros, bias, code, out_features, group_size, inputs, activation)
    if INPUTS[inputs]:
        value = rounded(x, group_size)
        return cuda(value, qweight, scales, zeros, bias, code, out_features, group_size, activation=activation).to(
            x.dtype
        )
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    qweight, scales, zeros = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    table = codebook(code, x.device)
    if triton_available() and (library is None or flat.shape[0] > CUDA_ROWS):
        kernel = importlib.import_module("pykd.kernels.linear_4bit")

        y: Tensor = kernel.linear_4bit(flat, qweight, scales, zeros, table, bias, code=code, group_size=group_size)
    else:
        y = launch(library, flat, qweight, scales, zeros, table, bias, code, group_size)
    return activate(y.view(*x.shape[:-1], out_features), activation)


def launch(
    library: Any,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    code: str,
    group_size: int,
) -> Tensor:
    """The CUDA kernel on x [rows, in_features] with unit stride along features."""
    y = torch.empty(x.shape[0], scales.shape[0], dtype=x.dtype, device=x.device)
    pointers = [None if t is None else t.data_ptr() for t in (qweight, scales, zeros, table, bias, y)]
    sizes = (x.shape[0], x.shape[1], scales.shape[0], group_size)
    with torch.cuda.device(x.device):
        status = library.pykd_cuda_linear_4bit(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.stride(0)),
            *(ctypes.c_void_p(pointer) for pointer in pointers),
            *(ctypes.c_int64(size) for size in sizes),
            code_number(code),
            DTYPE_CODES[x.dtype],
            ctypes.c_void_p(cuda_stream(x.device)),
        )
    check_cuda(status, "linear_4bit")
    return y
