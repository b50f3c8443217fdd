"""Triton kernels over a canonical 4-bit weight W (pykd/ops/int4_r16.py): y = x W^T + bias by tiles, any number of rows;
and W itself written out, for a product by cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: What a code means: (code - 8), (code - zero), table[code].
KINDS = {"int4": 0, "uint4": 1}
#: A weight, its tensors contiguous: (qweight, scales, zeros of uint4 or None, table of a codebook or None, code, group
#: size), the tensors as `_linear_4bit` has them.
Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, int]

#: Inputs per block of a tile in either kernel.
BLOCK_K, DENSE_BLOCK_K = 32, 64


@triton.jit
def _values(
    codes_rows,  # pointers to the codes of rows of W
    zero_rows,  # pointers to the zero points of these rows, for uint4
    table_ptr,  # [16] float32, for a codebook
    k,  # inputs
    group,  # their groups, or the one group of them all
    inside,  # which of rows x inputs exist
    group_inside,  # the same for rows x groups
    KIND: tl.constexpr,
):
    """What the codes mean before their scale, in float32."""
    byte = tl.load(codes_rows + k // 2, mask=inside, other=0).to(tl.int32)
    code = (byte >> ((k % 2) * 4)) & 15
    if KIND == 0:
        value = (code - 8).to(tl.float32)
    elif KIND == 1:
        pair = tl.load(zero_rows + group // 2, mask=group_inside, other=0).to(tl.int32)
        value = (code - ((pair >> ((group % 2) * 4)) & 15)).to(tl.float32)
    else:
        value = tl.load(table_ptr + code)
    return value


@triton.jit
def _linear_4bit(
    x_ptr,  # [rows, in_features] float32, bfloat16 or float16
    qweight_ptr,  # [out_features, ceil(in_features / 2)] uint8, even k in the low half
    scales_ptr,  # [out_features, groups] float16
    zeros_ptr,  # [out_features, ceil(groups / 2)] uint8, for uint4
    table_ptr,  # [16] float32, for a codebook
    bias_ptr,  # [out_features] float32, or any pointer when not HAS_BIAS
    y_ptr,  # [rows, out_features], dtype of x
    rows,
    out_features,
    in_features,
    x_stride,
    groups,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FOLD: tl.constexpr,  # a block of k is in one group, so the scale can wait until after the product
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, n_in = m < rows, n < out_features
    x_rows = x_ptr + m[:, None].to(tl.int64) * x_stride
    codes_rows = qweight_ptr + n[None, :].to(tl.int64) * ((in_features + 1) // 2)
    scale_rows = scales_ptr + n[None, :].to(tl.int64) * groups
    zero_rows = zeros_ptr + n[None, :].to(tl.int64) * ((groups + 1) // 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < in_features
        inside = k_in[:, None] & n_in[None, :]
        x = tl.load(x_rows + k[None, :], mask=m_in[:, None] & k_in[None, :], other=0.0)
        if FOLD:
            group, group_inside = start // GROUP, n_in[None, :]
        else:
            group, group_inside = (k // GROUP)[:, None], inside
        weight = _values(codes_rows, zero_rows, table_ptr, k[:, None], group, inside, group_inside, KIND)
        scale = tl.load(scale_rows + group, mask=group_inside, other=0.0).to(tl.float32)
        if FOLD:  # small integers are exact in every dtype: multiply on the tensor cores, scale in float32
            total += tl.dot(x, weight.to(x.dtype), input_precision="ieee") * scale
        else:
            total += tl.dot(x.to(tl.float32), weight * scale, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_in, other=0.0)[None, :]
    y = y_ptr + m[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=m_in[:, None] & n_in[None, :])


@triton.jit
def _dequantize(
    qweight_ptr,  # as in _linear_4bit, like the next three
    scales_ptr,
    zeros_ptr,
    table_ptr,
    weight_ptr,  # [out_features, in_features] float32, bfloat16 or float16
    out_features,
    in_features,
    groups,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ONE_GROUP: tl.constexpr,  # a block of k is in one group: its scale and zero point are read once a row
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    start = tl.program_id(1) * BLOCK_K
    k = (start + tl.arange(0, BLOCK_K))[None, :]
    n_in = n < out_features
    inside = n_in & (k < in_features)
    codes_rows = qweight_ptr + n.to(tl.int64) * ((in_features + 1) // 2)
    scale_rows = scales_ptr + n.to(tl.int64) * groups
    zero_rows = zeros_ptr + n.to(tl.int64) * ((groups + 1) // 2)
    if ONE_GROUP:
        group, group_inside = start // GROUP, n_in
    else:
        group, group_inside = k // GROUP, inside
    value = _values(codes_rows, zero_rows, table_ptr, k, group, inside, group_inside, KIND)
    scale = tl.load(scale_rows + group, mask=group_inside, other=0.0)
    weight = weight_ptr + n.to(tl.int64) * in_features + k
    tl.store(weight, (value * scale.to(tl.float32)).to(weight_ptr.dtype.element_ty), mask=inside)


def multiplies_codes(code: str, group_size: int) -> bool:
    """Whether `linear_4bit` multiplies the codes themselves, in x's dtype, and scales sums; else it is all float32."""
    return code in KINDS and group_size % BLOCK_K == 0


def dequantize(weight: Weight, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [out_features, in_features], computed in float32 and rounded once to `dtype`, in one pass.

    Reads the packed weight once and writes 2 or 4 bytes a weight.
    """
    _, scales, _, _, code, group_size = weight
    out_features, groups = scales.shape
    dense = torch.empty(out_features, in_features, dtype=dtype, device=scales.device)
    if dense.numel() == 0:
        return dense
    grid = (triton.cdiv(out_features, 64), triton.cdiv(in_features, DENSE_BLOCK_K))
    _dequantize[grid](
        *_pointers(weight),
        dense,
        out_features,
        in_features,
        groups,
        GROUP=group_size,
        KIND=KINDS.get(code, 2),
        ONE_GROUP=group_size % DENSE_BLOCK_K == 0,
        BLOCK_N=64,
        BLOCK_K=DENSE_BLOCK_K,
    )
    return dense


def linear_4bit(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Launch on x [rows, in_features] with unit stride along features; `bias` float32; returns [rows, out_features]."""
    _, scales, _, _, code, group_size = weight
    rows, in_features = x.shape
    out_features, groups = scales.shape
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # Triton's interpreter (tensors on the CPU) multiplies bfloat16 bit patterns as integers: float32 there.
    tensor_cores = x.is_cuda or x.dtype != torch.bfloat16
    block_m = min(max(triton.next_power_of_2(rows), 16), 64)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(out_features, 64))
    _linear_4bit[grid](
        x,
        *_pointers(weight),
        scales if bias is None else bias,
        y,
        rows,
        out_features,
        in_features,
        x.stride(0),
        groups,
        GROUP=group_size,
        KIND=KINDS.get(code, 2),
        HAS_BIAS=bias is not None,
        FOLD=multiplies_codes(code, group_size) and tensor_cores,
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK_K=BLOCK_K,
    )
    return y


def _pointers(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a weight; for one that its code does not have, any other, which is not read."""
    qweight, scales, zeros, table, _, _ = weight
    return qweight, scales, qweight if zeros is None else zeros, scales if table is None else table
