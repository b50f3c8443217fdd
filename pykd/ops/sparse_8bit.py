"""The w8a8 linear layer over a pruned weight: what `linear_8bit` computes, to the bit, from the kept codes alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .activation import ACTIVATIONS, activation_gradient, check_activation
from .bitmask import bitmask_offsets
from .dispatch import DTYPE_CODES, TABLE, Route, lib, native, num_threads, skips_dispatcher, vector_level
from .sparse_panels import PACKINGS, TILE, panels_pack

#: Level -> [(most rows, density above which the dense kernel is faster)], in ascending order. AVX2's were measured on a
#: Zen 3, AVX-512's on a Zen 5: with 20 % kept 1.0 to 1.9 times faster than dense below 32 rows, 1.5 at 128; with 30 %
#: 0.8 to 1.5 and 1.2; with 50 % slower at any number.
DENSE_ABOVE: dict[str, list[tuple[float, float]]] = {
    "scalar": [(math.inf, 0.0)],
    "avx2": [(1, 0.02), (7, 0.06), (15, 0.18), (math.inf, 0.5)],
    "avx512": [(31, 0.22), (math.inf, 0.3)],
}


def least_rows(density: float) -> float:
    """From how many rows of activations on the kernel is faster than the dense one (by `DENSE_ABOVE`); inf for never.

    >>> least_rows(1.0)
    inf
    """
    lines = [(0.0, -1.0), *DENSE_ABOVE[vector_level()]] if native is not None else []
    for (fewer, _), (_, dense) in itertools.pairwise(lines):
        if density <= dense:
            return fewer + 1
    return math.inf


def pack_codes(qweight: Tensor, bitmask: Tensor) -> Tensor:
    """The pack of an int8 weight [out, in] on the CPU whose codes other than 0 are those of the bitmask.

    It is for the instruction-set level in force; the others refuse it where theirs differs.
    """
    packing = next(name for name, number in PACKINGS.items() if number == native.codes_packing())
    offsets = bitmask_offsets(bitmask, qweight.shape[1])
    return panels_pack(bitmask.contiguous(), qweight[qweight != 0], offsets, qweight.shape[1], packing)


def unpack_codes(pack: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of `pack_codes`: int8 [out_features, in_features]. Raises ValueError for the pack of another weight."""
    dense = torch.empty(out_features, in_features, dtype=torch.int8)
    native.sparse_codes_unpack(pack.data_ptr(), in_features, out_features, dense.data_ptr())
    return dense


def sparse_8bit(
    x: Tensor, pack: Tensor, scales: Tensor, *, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """y = activation(x W^T + bias), W = q * scale with pruned int8 codes q: `pykd.linear_8bit` with scheme "w8a8".

    Args:
        x: activations [..., in_features] on the CPU; float32, bfloat16 or float16. Any strides.
        pack: what `pack_codes` made.
        scales: float32 [out_features].
        bias: [out_features], floating point, or None.
        activation: "gelu", "gelu_tanh", "silu", "relu" or None.

    Returns [..., out_features] in x's dtype, differentiable in x and bias. Raises TypeError for other element types of
    x, ValueError for shapes that do not fit.

    >>> from pykd.ops.bitmask import pack_bits
    >>> codes = torch.tensor([[127, 0], [0, 0]], dtype=torch.int8)
    >>> sparse_8bit(torch.ones(1, 2), pack_codes(codes, pack_bits(codes != 0)), torch.ones(2) / 127)
    tensor([[1., 0.]])
    """
    check_activation(activation)
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"sparse_8bit takes float32, bfloat16 or float16; x is {x.dtype}: convert it")
    if bias is not None and bias.shape != scales.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (out_features,) = {tuple(scales.shape)}")
    call = _cpu if skips_dispatcher(x, bias) else torch.ops.pykd.sparse_8bit
    result: Tensor = call(x, pack, scales, bias, activation)
    return result


lib.define(  # type: ignore[no-untyped-call]
    "sparse_8bit(Tensor x, Tensor pack, Tensor scales, Tensor? bias, str? activation=None) -> Tensor"
)
lib.define("dequantize_sparse_8bit(Tensor pack, Tensor scales, int in_features) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(lib, "sparse_8bit", "CPU")
def _cpu(x: Tensor, pack: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    in_features, out_features, threads = x.shape[-1], scales.shape[0], num_threads()
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, in_features).contiguous()
    rows = flat.shape[0]
    y = torch.empty(rows, out_features, dtype=x.dtype)
    if bias is not None and (bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if rows:
        scratch = torch.empty(native.sparse_8bit_scratch(rows, in_features, TILE, threads))
        native.sparse_8bit(
            flat.data_ptr(), flat.stride(0), pack.data_ptr(), scales.data_ptr(),
            0 if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(), rows, in_features, out_features,
            ACTIVATIONS[activation], DTYPE_CODES[x.dtype], 0 if bias is None else DTYPE_CODES[bias.dtype], threads,
        )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("pykd::sparse_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, pack: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.impl(lib, "dequantize_sparse_8bit", "CPU")
def _dequantize(pack: Tensor, scales: Tensor, in_features: int) -> Tensor:
    return unpack_codes(pack, scales.shape[0], in_features).float() * scales.unsqueeze(1)


@torch.library.register_fake("pykd::dequantize_sparse_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake_dequantize(pack: Tensor, scales: Tensor, in_features: int) -> Tensor:
    return scales.new_empty((scales.shape[0], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pack, scales, bias, ctx.activation = inputs
    ctx.save_for_backward(pack, scales, *(() if ctx.activation is None else (x, bias)))
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy W with the dequantized weight, straight through the rounding of x; db = sum of dy over rows.

    With an activation, what it was applied to is computed again.
    """
    pack, scales, *inputs = ctx.saved_tensors
    wide = grad.float()
    dx = db = None
    if ctx.activation is not None:
        x, bias = inputs
        wide = activation_gradient(wide, torch.ops.pykd.sparse_8bit(x.float(), pack, scales, bias), ctx.activation)
    if ctx.needs_input_grad[0]:
        dx = (wide @ torch.ops.pykd.dequantize_sparse_8bit(pack, scales, ctx.in_features)).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        db = wide.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return dx, None, None, db, None


torch.library.register_autograd("pykd::sparse_8bit", _backward, setup_context=_setup_context, lib=lib)

if native is not None:
    for _level, _lines in DENSE_ABOVE.items():
        for _rows, _dense in _lines:
            _when = f"pruned w8a8, isa {_level}, up to {_rows:g} rows: density up to {_dense:g}"
            TABLE.append(Route("sparse_8bit", "cpu", _when, "native, kept codes"))
    TABLE.append(Route("sparse_8bit", "cpu", "otherwise", "no gain there: linear_8bit"))
