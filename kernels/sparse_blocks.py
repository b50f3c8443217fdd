"""Triton: linear layer over a weight of which square blocks are kept whole; the tensor cores meet no pruned block."""

import triton
import triton.language as tl

from .sparse_linear import DOT_TYPES


@triton.jit
def _kernel(
    x,  # [rows, in_features] contiguous
    blocks,  # [kept blocks, SIZE, SIZE] contiguous, in the order of block rows
    columns,  # int32 [kept blocks]: block column of each
    offsets,  # int32 [block rows + 1]: index of each block row's first block
    bias,  # [out_features], or x when HAS_BIAS is false
    y,  # [rows, out_features]
    rows,
    in_features,
    out_features,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,  # element type of the products: that of x and blocks where they agree, else float32
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    block_row = tl.program_id(0)
    side = tl.arange(0, SIZE)
    n = (block_row * SIZE + side).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    in_n, in_m = n < out_features, m < rows
    total = tl.zeros((BLOCK_M, SIZE), dtype=tl.float32)
    first, last = tl.load(offsets + block_row), tl.load(offsets + block_row + 1)
    block = blocks + first.to(tl.int64) * SIZE * SIZE
    for index in range(first, last):
        k = tl.load(columns + index) * SIZE + side
        in_k = k < in_features
        w = tl.load(block + side[:, None] * SIZE + side[None, :]).to(DOT)
        a = tl.load(x + m[:, None] * in_features + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0).to(DOT)
        total = tl.dot(a, tl.trans(w), acc=total, input_precision="ieee")
        block += SIZE * SIZE
    if HAS_BIAS:
        total += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m[:, None] * out_features + n[None, :], total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :]
    )


def sparse_blocks(x, blocks, columns, offsets, bias, y):
    """Launch on contiguous x [rows, in], writing y [rows, out] of x's dtype; sums in float32."""
    rows, in_features = x.shape
    block_m = 16 if rows <= 16 else 64
    grid = (offsets.shape[0] - 1, triton.cdiv(rows, block_m))
    _kernel[grid](
        x,
        blocks,
        columns,
        offsets,
        x if bias is None else bias,
        y,
        rows,
        in_features,
        y.shape[1],
        HAS_BIAS=bias is not None,
        DOT=DOT_TYPES[x.dtype] if x.dtype == blocks.dtype else tl.float32,
        SIZE=blocks.shape[1],
        BLOCK_M=block_m,
    )
