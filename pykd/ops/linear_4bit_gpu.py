"""The op `linear_4bit` on NVIDIA GPUs: the CUDA kernel for few rows, then Triton's tiles, then cuBLAS on a weight that
Triton writes out; without either, the reference."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.activation import activate
from pykd.ops.dispatch import DTYPE_CODES, check_cuda, cuda_library, cuda_stream, triton_available
from pykd.ops.int4_r16 import code_number, codebook
from pykd.ops.linear_4bit_reference import INPUTS, reference, rounded

#: Up to this many rows the CUDA kernel streams the weight once per call; beyond, Triton's tiles reuse it.
CUDA_ROWS = 8

#: Up to so many rows Triton's tiles decode the weight as they multiply; beyond, it is written out once for cuBLAS.
#: Predicted, not measured, for an H100 (3.35 TB/s; 990 TFLOP/s in 16 bits, 67 in float32; 3.0e13 instructions a second
#: over all threads) and a weight beyond its caches. Written out, a weight costs 0.5 bytes read, 2 written and 2 read,
#: 1.35 ps, and up to about 300 rows cuBLAS adds nothing to that. Triton's tiles, as compiled for sm_90, issue 22
#: instructions a weight for every 64 rows, 0.75 ps (a sixth of the tensor cores' rate): two are about even, three lose.
TENSOR_CORE_ROWS = 128
#: The same where the tiles multiply in float32 (codebooks, groups that are no multiple of 32, float32 x): 96
#: instructions, 3.2 ps, from the first tile of 64 rows on; with float32 x, 4 bytes written and read cost 2.5 ps.
FLOAT32_ROWS = 32


class Weight(NamedTuple):
    """A canonical weight, contiguous, as the kernels take it; table: float32 [16] of a codebook, else None."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None
    code: str
    group_size: int

    @classmethod
    def of(cls, qweight: Tensor, scales: Tensor, zeros: Tensor | None, code: str, group_size: int) -> Weight:
        """With the table of the code, on the device of the codes."""
        zeros = None if zeros is None else zeros.contiguous()
        return cls(qweight.contiguous(), scales.contiguous(), zeros, codebook(code, qweight.device), code, group_size)


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
    """The op on an NVIDIA GPU, by the route that `choose` names."""
    library = cuda_library()
    if scales is not None and scales.dtype != torch.float16:
        library = None  # its kernels read float16
    if scales is None or x.dtype not in DTYPE_CODES or not (library or triton_available()):
        return reference(x, qweight, scales, zeros, bias, code, out_features, group_size, inputs, activation)
    value = rounded(x, group_size) if INPUTS[inputs] else x
    flat = value.reshape(-1, value.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    weight = Weight.of(qweight, scales, zeros, code, group_size)
    installed = {"library": library is not None, "triton": triton_available()}
    route = choose(flat.shape[0], flat.dtype, code, group_size, **installed)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # where kernels launch: there may be several
        if route == "dense":
            y = dense(flat, weight, bias)
        else:
            bias = None if bias is None else bias.float().contiguous()
            y = launch(library, flat, weight, bias) if route == "cuda" else _kernels().linear_4bit(flat, weight, bias)
    return activate(y.view(*x.shape[:-1], out_features), activation).to(x.dtype)


def choose(rows: int, dtype: torch.dtype, code: str, group_size: int, *, library: bool, triton: bool) -> str:
    """The route of x with so many rows, "cuda", "triton" or "dense": the rules of `build_info()["table"]`."""
    if not triton or (library and rows <= CUDA_ROWS):
        return "cuda"
    tensor_cores = dtype != torch.float32 and _kernels().multiplies_codes(code, group_size)
    return "triton" if rows <= (TENSOR_CORE_ROWS if tensor_cores else FLOAT32_ROWS) else "dense"


def _kernels() -> Any:
    return importlib.import_module("pykd.kernels.linear_4bit")


def dense(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias by cuBLAS on x [rows, in_features], with W written out for this call.

    W takes out_features * in_features * 2 bytes while the call lasts (4 for float32), from torch's allocator: nothing
    waits for the host, and a CUDA graph can capture it. W and the bias are rounded once to x's dtype, as a dense layer
    of that dtype holds them. Triton's tiles and the CUDA kernel do not round W: there, 16-bit results differ by that
    rounding (at most 2^-8 of a weight in bfloat16, 2^-11 in float16, whose range is W's too), and float32 results by
    the order of their sums. How cuBLAS adds up follows torch's settings: TensorFloat-32, reductions in 16 bits.
    """
    written = _kernels().dequantize(weight, x.shape[1], x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # x's dtype is the one that was asked for
        return F.linear(x, written, None if bias is None else bias.to(x.dtype))


def launch(library: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The CUDA kernel, on the current device: x [rows, in_features] with unit stride along features, bias float32."""
    out_features = weight.scales.shape[0]
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    tensors = (weight.qweight, weight.scales, weight.zeros, weight.table, bias, y)
    sizes = (x.shape[0], x.shape[1], out_features, weight.group_size)
    status = library.pykd_cuda_linear_4bit(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.stride(0)),
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int64(size) for size in sizes),
        code_number(weight.code),
        DTYPE_CODES[x.dtype],
        ctypes.c_void_p(cuda_stream(x.device)),
    )
    check_cuda(status, "linear_4bit")
    return y
