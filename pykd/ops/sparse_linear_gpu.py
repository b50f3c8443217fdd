"""The routes of `sparse_linear` on NVIDIA GPUs: by the number of rows, and by what the mask happens to be made of."""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitmask import bitmask_expand_reference, unpack_bits
from .dispatch import TABLE, Route, check_cuda, cuda_library, cuda_stream, dtype_code, triton_available

if TYPE_CHECKING:
    from .sparse_linear import Layout

#: Rows of x up to which a warp per row of W beats expanding tiles for the tensor cores.
GEMV_ROWS = 8
#: Rows from which torch's 2:4 multiplication is worth its call: below, it is published to be slower than dense.
SEMI_ROWS = 1024
#: What the sizes of a 2:4 weight have to be multiples of, for either of torch's libraries.
SEMI_SIZES = 64
#: Sides of blocks that the tensor cores take, largest first.
BLOCK_SIZES = (64, 32, 16)


class Blocks(NamedTuple):
    """Square blocks of a weight: `values` [kept, size, size], `columns` int32 [kept], `offsets` int32 [rows + 1]."""

    values: Tensor
    columns: Tensor
    offsets: Tensor


def run_cuda(x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    """y of checked arguments, x [rows, in] contiguous; None where neither our library nor Triton can serve."""
    rows, out_features = x.shape[0], layout.packed.out_features
    library = cuda_library()
    if library is None and not triton_available():
        return None
    if rows >= SEMI_ROWS and fits_semi(x.dtype, layout):
        return F.linear(x, _semi(layout), None if bias is None else bias.to(x.dtype))
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.float().contiguous()
    with torch.cuda.device(x.device):
        if library is not None and (rows <= GEMV_ROWS or not triton_available()):
            launch(library, x, layout, bias, y)
        else:
            run_triton(x, layout, bias, y)
    return y


def run_triton(x: Tensor, layout: Layout, bias: Tensor | None, y: Tensor) -> None:
    """By blocks where the mask is made of them, else with the weight expanded tile by tile."""
    bitmask, values, _ = layout.packed
    blocks = _blocks_of(layout)
    if blocks is not None:
        importlib.import_module("pykd.kernels.sparse_blocks").sparse_blocks(x, *blocks, bias, y)
    else:
        importlib.import_module("pykd.kernels.sparse_linear").sparse_linear(x, bitmask, values, layout.offsets, bias, y)


def launch(library: ctypes.CDLL, x: Tensor, layout: Layout, bias: Tensor | None, y: Tensor) -> None:
    """The CUDA kernel for few rows."""
    pointers = (x, layout.packed.bitmask, layout.packed.values, layout.offsets, bias, y)
    sizes = (x.shape[0], x.shape[1], layout.packed.out_features)
    code = library.pykd_cuda_sparse_linear(
        *(ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()) for tensor in pointers),
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_int(dtype_code(x)),
        ctypes.c_int(dtype_code(layout.packed.values)),
        ctypes.c_void_p(cuda_stream(x.device)),
    )
    check_cuda(code, "sparse_linear")


def fits_semi(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether torch's 2:4 multiplication takes the weight: at most two of four neighbours kept, 16-bit elements."""
    packed = layout.packed
    sizes = packed.out_features % SEMI_SIZES == packed.in_features % SEMI_SIZES == 0
    if dtype not in (torch.float16, torch.bfloat16) or packed.values.dtype != dtype or not sizes:
        return False
    if "2:4" not in layout.facts:
        count = unpack_bits(packed.bitmask, packed.in_features).view(packed.out_features, -1, 4).sum(-1)
        layout.facts["2:4"] = bool((count <= 2).all())
    return bool(layout.facts["2:4"])


def _semi(layout: Layout) -> Tensor:
    if "2:4" not in layout.made:
        bitmask, values, in_features = layout.packed
        dense = bitmask_expand_reference(values, bitmask, in_features)
        layout.made["2:4"] = torch.sparse.to_sparse_semi_structured(dense)
    return layout.made["2:4"]


def _blocks_of(layout: Layout) -> Blocks | None:
    if "blocks" not in layout.facts:
        bitmask, values, in_features = layout.packed
        size = block_size(bitmask, in_features)
        layout.facts["blocks"] = None if size is None else make_blocks(values, bitmask, in_features, size)
    found = layout.facts["blocks"]
    return found if isinstance(found, Blocks) else None


def block_size(bitmask: Tensor, in_features: int) -> int | None:
    """The largest of BLOCK_SIZES whose blocks are kept or pruned whole; None when there is none.

    >>> block_size(torch.full((16, 2), 255, dtype=torch.uint8), 16)
    64
    """
    mask = unpack_bits(bitmask, in_features)
    for size in BLOCK_SIZES:
        blocks = _split(mask, size)
        inside = _split(torch.ones_like(mask), size)
        if torch.equal(blocks, blocks.flatten(2).any(-1)[..., None, None] & inside):
            return size
    return None


def make_blocks(values: Tensor, bitmask: Tensor, in_features: int, size: int) -> Blocks:
    """The kept blocks of a weight made of blocks; those at the edges are filled up with zeros."""
    kept = _split(unpack_bits(bitmask, in_features), size).flatten(2).any(-1)
    dense = _split(bitmask_expand_reference(values, bitmask, in_features), size)
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return Blocks(dense[kept].contiguous(), kept.nonzero()[:, 1].int(), offsets.int())


def _split(matrix: Tensor, size: int) -> Tensor:
    """[block rows, block columns, size, size], zero beyond the edges."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % size, 0, -rows % size))
    return padded.view(-(-rows // size), size, -(-columns // size), size).transpose(1, 2)


TABLE.append(Route("sparse_linear", "cuda", f"2:4, 16-bit, from {SEMI_ROWS} rows", "torch semi-structured"))
TABLE.append(Route("sparse_linear", "cuda", f"CUDA library, up to {GEMV_ROWS} rows or no Triton", "cuda"))
TABLE.append(Route("sparse_linear", "cuda", "blocks of 16 x 16 and larger", "triton, block by block"))
TABLE.append(Route("sparse_linear", "cuda", "otherwise, with Triton", "triton"))
