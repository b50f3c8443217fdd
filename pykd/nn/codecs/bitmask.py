"""The sparse storage format: a dense weight to bitmask + values and back (format of `pykd.ops.bitmask`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pykd.ops.bitmask import PackedSparse, bitmask_expand, check_packed, pack_bits, unpack_bits

__all__ = ["pack", "pack_bits", "packed_bytes", "unpack", "unpack_bits"]


def pack(weight: Tensor, mask: Tensor | None = None) -> PackedSparse:
    """Bitmask + values of a matrix: the elements that `mask` keeps, whatever their value.

    Args:
        weight: [out, in], any floating-point or integer dtype.
        mask: boolean [out, in], True = kept; by default the elements that are not zero. A kept zero stays a value
            (and stays trainable); a NaN differs from zero and is kept; -0.0 equals zero and is not.

    Raises:
        ValueError: the weight is not a matrix, or the mask is not boolean or of another shape.

    >>> pack(torch.tensor([[1.0, 0.0, 2.0]]))
    PackedSparse(bitmask=tensor([[5]], dtype=torch.uint8), values=tensor([1., 2.]), in_features=3)
    """
    if weight.ndim != 2:
        raise ValueError(f"a packed weight is a matrix [out, in]; got shape {tuple(weight.shape)}: flatten it first")
    kept = weight != 0 if mask is None else mask
    if kept.dtype != torch.bool or kept.shape != weight.shape:
        raise ValueError(
            f"the mask has to be boolean with the weight's shape {tuple(weight.shape)}; "
            f"got {kept.dtype} of shape {tuple(kept.shape)}"
        )
    return PackedSparse(pack_bits(kept), weight[kept], weight.shape[1])


def unpack(packed: PackedSparse) -> Tensor:
    """The dense matrix of a packed one: kept elements bit for bit, +0 elsewhere. Checks the parts against each other.

    Raises:
        ValueError: the number of values is not the number of set bits, a bit past the last column is set, or a shape
            does not fit.
    """
    check_packed(packed)
    return bitmask_expand(packed)


def packed_bytes(shape: tuple[int, int], nnz: int, element_size: int) -> int:
    """Bytes of a packed matrix [out, in] with `nnz` kept elements of `element_size` bytes.

    ``out * ceil(in / 8) + nnz * element_size``: for float32 smaller than dense above 3.2 % sparsity, for 2-byte
    elements above 6.3 %.
    """
    return shape[0] * ((shape[1] + 7) // 8) + nnz * element_size
