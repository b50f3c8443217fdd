"""The 8-bit linear layer: int8 weights per output, int8 activations per row, rounded inside the call (w8a8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, lib, native

TABLE.extend(
    [
        Route("linear_8bit", "cpu", "AVX-512 VNNI", "torch._int_mm"),
        Route("linear_8bit", "cuda", "always", "torch._int_mm, rows and sizes padded as it needs"),
        Route("linear_8bit", "other", "always", "reference: the same integers, multiplied as float32"),
    ]
)

lib.define("linear_8bit(Tensor x, Tensor qweight, Tensor scales, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]

#: Without VNNI torch._int_mm is a plain loop on the CPU, many times slower than a float32 product.
_VNNI = native is not None and "avx512" in native.isa_levels()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of activations [rows, in_features]: int8 in -127..127 and float32 scales [rows, 1].

    A row that holds NaN or infinity gets a NaN scale, so that its result is NaN and not a plausible number.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True)
    scales = torch.where(torch.isfinite(largest), largest / 127, torch.nan)
    safe = torch.where(scales > 0, scales, 1.0)
    return (wide / safe).nan_to_num().round().clamp(-127, 127).to(torch.int8), scales


def linear_8bit_reference(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(x_q W_q^T) * x_scale * scale + bias over the rows of x, the integers multiplied as float32."""
    codes, row_scales = quantize_rows(x)
    return _finish(F.linear(codes.float(), qweight.float()), row_scales, scales, bias, x.dtype)


def linear_8bit(x: Tensor, qweight: Tensor, scales: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with W = qweight * scale, x rounded to int8 with one scale per row (dynamic W8A8).

    y = (sum_k q_x q_w) * (absmax(x) / 127) * scale + bias: the integer sum is exact up to what float32 holds.

    Args:
        x: activations [..., in_features], floating point. Any strides.
        qweight: int8 [out_features, in_features]; `scales` float32 [out_features]; `bias` [out_features] or None.

    Returns [..., out_features] in x's dtype. The gradient to x is the one of the dequantized weight (straight through
    the rounding of x). Raises ValueError when shapes or dtypes do not fit.

    >>> from pykd.nn.codecs.eight_bit import quantize_8bit
    >>> linear_8bit(torch.ones(1, 2), *quantize_8bit(torch.eye(2)))
    tensor([[1., 1.]])
    """
    if x.dim() < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., in_features >= 1], got {x.dtype} {list(x.shape)}")
    if qweight.dtype != torch.int8 or qweight.dim() != 2 or qweight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"qweight must be int8 [out_features, {x.shape[-1]}] to fit x, got {qweight.dtype} {list(qweight.shape)}"
        )
    if scales.shape != qweight.shape[:1] or (bias is not None and bias.shape != qweight.shape[:1]):
        raise ValueError(f"scales and bias must have shape [{qweight.shape[0]}], one per output")
    result: Tensor = torch.ops.pykd.linear_8bit(x, qweight, scales, bias)
    return result


def _finish(sums: Tensor, row_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.float() * row_scales * scales
    return (y if bias is None else y + bias.float()).to(dtype)


def _int_mm(codes: Tensor, qweight: Tensor) -> Tensor:
    """int32 [rows, out]. CUDA needs more than 16 rows and sizes that are multiples of 8."""
    rows, out = codes.shape[0], qweight.shape[0]
    if codes.is_cuda:
        fill = -codes.shape[1] % 8
        codes = F.pad(codes, (0, fill, 0, max(0, 17 - rows)))
        qweight = F.pad(qweight, (0, fill, 0, -out % 8))
    result: Tensor = torch._int_mm(codes, qweight.t())
    return result[:rows, :out]


@torch.library.impl(lib, "linear_8bit", "CompositeExplicitAutograd")
def _linear_8bit(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda or (x.is_cpu and _VNNI):
        codes, row_scales = quantize_rows(flat)
        y = _finish(_int_mm(codes, qweight), row_scales, scales, bias, x.dtype)
    else:
        y = linear_8bit_reference(flat, qweight, scales, bias)
    return y.view(*x.shape[:-1], qweight.shape[0])


@torch.library.register_fake("pykd::linear_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scales, bias = inputs
    ctx.save_for_backward(qweight, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.matmul(grad.float() * scales, qweight.float()).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        db = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return dx, None, None, db


torch.library.register_autograd("pykd::linear_8bit", _backward, setup_context=_setup_context, lib=lib)
