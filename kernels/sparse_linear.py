"""Triton: linear layer over a bitmask + values weight, expanded tile by tile in front of the tensor cores."""

import os

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    x,  # [rows, in_features] contiguous
    bitmask,  # uint8 [out_features, row_bytes]
    values,  # [nnz], row-major
    offsets,  # int64 [out_features + 1]
    bias,  # [out_features], or x when HAS_BIAS is false
    y,  # [rows, out_features]
    rows,
    in_features,
    out_features,
    row_bytes,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,  # element type of the products: that of x and values where they agree, else float32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    in_n, in_m = n < out_features, m < rows
    first = tl.load(offsets + n, mask=in_n, other=0)  # the next value of each row
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, in_features, BLOCK_K):
        k = k0 + column
        in_k = k < in_features
        byte = tl.load(
            bitmask + n[:, None] * row_bytes + (k // 8)[None, :], mask=in_n[:, None] & in_k[None, :], other=0
        )
        bit = (byte.to(tl.int32) >> (k % 8)[None, :]) & 1
        index = first[:, None] + tl.cumsum(bit, axis=1) - bit
        w = tl.load(values + index, mask=bit != 0, other=0.0).to(DOT)
        a = tl.load(x + m[:, None] * in_features + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0).to(DOT)
        total = tl.dot(a, tl.trans(w), acc=total, input_precision="ieee")
        first += tl.sum(bit, axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m[:, None] * out_features + n[None, :], total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :]
    )


# Triton's interpreter multiplies the bits of bfloat16 in tl.dot as if they were integers: it gets float32.
_BF16 = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16
DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: _BF16, torch.float16: tl.float16}


def sparse_linear(x, bitmask, values, offsets, bias, y):
    """Launch on contiguous x [rows, in], writing y [rows, out] of x's dtype; sums in float32."""
    rows, in_features = x.shape
    out_features, row_bytes = bitmask.shape
    block_m = 16 if rows <= 16 else 64
    grid = (triton.cdiv(out_features, 64), triton.cdiv(rows, block_m))
    _kernel[grid](
        x,
        bitmask,
        values,
        offsets,
        x if bias is None else bias,
        y,
        rows,
        in_features,
        out_features,
        row_bytes,
        HAS_BIAS=bias is not None,
        DOT=DOT_TYPES[x.dtype] if x.dtype == values.dtype else tl.float32,
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK_K=32,
    )
