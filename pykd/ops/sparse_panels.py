"""The panels pack: a sparse weight as the native kernels for many rows read it (csrc/cpu/sparse_panels.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import native

#: How a pack holds its weights: rows two by two, rows four by four that keep the same columns, or int8 codes: two by
#: two, or sixteen rows by windows of columns. The numbers are those of `Packing` in csrc/cpu/sparse_panels.h.
PACKINGS = {"pairs": 0, "quads": 1, "codes": 2, "windows": 3}

#: Columns of x in an L1 tile: 128 x 32 rows x 4 bytes = 16 KB at 8 lanes, 32 KB at 16.
TILE = 128


def panels_pack(bitmask: Tensor, values: Tensor, offsets: Tensor, in_features: int, packing: str) -> Tensor:
    """The pack, uint8, of a checked weight on the CPU.

    bitmask: contiguous; values [nnz], converted to int8 for "codes" and "windows", else to float32; offsets:
    `bitmask_offsets`.
    """
    values = values.to(torch.int8 if packing in ("codes", "windows") else torch.float32).contiguous()
    mask, sizes, kind = bitmask.data_ptr(), (in_features, bitmask.shape[0], TILE), PACKINGS[packing]
    pack = torch.empty(native.sparse_panels_bytes(mask, *sizes, kind), dtype=torch.uint8)
    native.sparse_panels_pack(mask, values.data_ptr(), offsets.data_ptr(), *sizes, kind, pack.data_ptr())
    return pack


def in_quads(bitmask: Tensor) -> bool:
    """Whether rows 4 i to 4 i + 3 keep the same columns, all i: blocks of 4 x 1 and larger.

    >>> in_quads(torch.tensor([[1], [1], [1], [1], [2]], dtype=torch.uint8))
    True
    """
    whole = bitmask.shape[0] // 4 * 4
    quads = bitmask[:whole].view(whole // 4, 4, bitmask.shape[1])
    rest = bitmask[whole:]
    return bool((quads == quads[:, :1]).all()) and bool((rest == rest[:1]).all())
