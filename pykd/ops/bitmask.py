"""Bitmask + values: the canonical form of a sparse matrix, and the two differentiable ops between it and a dense one.

A matrix of `out` rows and `in` columns is `bitmask`, uint8 [out, ceil(in / 8)], whose bit `k % 8` (least significant
first) of byte `k // 8` says that column k is kept, and `values` [nnz], the kept elements in row-major order. Bits past
the last column are 0. An element is pruned exactly where its bit is 0: NaN, infinities and -0.0 are values like others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import TABLE, Route, lib, native, num_threads


class PackedSparse(NamedTuple):
    """A sparse matrix: `bitmask` uint8 [out, ceil(in / 8)], `values` [nnz] and the number of columns."""

    bitmask: Tensor
    values: Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        return self.bitmask.shape[0]

    @property
    def density(self) -> float:
        """Share of the elements that is kept, in [0, 1]; 0 for an empty matrix."""
        cells = self.out_features * self.in_features
        return self.values.numel() / cells if cells else 0.0


def pack_bits(mask: Tensor) -> Tensor:
    """The bits of a boolean matrix [out, in], eight columns a byte, least significant first: uint8 [out, ceil(in / 8)].

    >>> pack_bits(torch.tensor([[True, False, True, False, False, False, False, False, True]]))
    tensor([[5, 1]], dtype=torch.uint8)
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"pack_bits packs a boolean matrix [out, in]; got {mask.dtype} of shape {tuple(mask.shape)}")
    rows, columns = mask.shape
    padded = torch.zeros(rows, (columns + 7) // 8 * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :columns] = mask
    return (padded.view(rows, padded.shape[1] // 8, 8) << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_bits`: the boolean matrix [out, in_features]."""
    bits = (bitmask.unsqueeze(-1) >> _shifts(bitmask.device)) & 1
    return bits.view(bitmask.shape[0], bitmask.shape[1] * 8)[:, :in_features].bool()


def bitmask_offsets(bitmask: Tensor, in_features: int) -> Tensor:
    """Index of each row's first value, and at the end the number of values: int64 [out + 1] on the bitmask's device.

    Raises:
        ValueError: the bitmask is not uint8 [out, ceil(in_features / 8)], or a bit past the last column is set.
    """
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != (in_features + 7) // 8:
        raise ValueError(
            f"the bitmask of a matrix with {in_features} columns is uint8 [out, {(in_features + 7) // 8}]; "
            f"got {bitmask.dtype} of shape {tuple(bitmask.shape)}"
        )
    if native is not None and bitmask.device.type == "cpu":
        bitmask = bitmask.contiguous()
        offsets = torch.empty(bitmask.shape[0] + 1, dtype=torch.int64)
        row = native.bitmask_offsets(bitmask.data_ptr(), in_features, bitmask.shape[0], offsets.data_ptr())
    else:
        counts = unpack_bits(bitmask, in_features).sum(1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        extra = (bitmask[:, -1:].int() >> ((in_features - 1) % 8 + 1)).any(1) if in_features else counts > 0
        row = int(extra.int().argmax()) if bool(extra.any()) else -1
    if row >= 0:
        raise ValueError(
            f"corrupt bitmask: row {row} has bits set past its last column, {in_features - 1}; load the weight again"
        )
    return offsets


def check_packed(packed: PackedSparse) -> Tensor:
    """The row offsets of a packed matrix whose parts fit each other; otherwise a `ValueError` says what does not."""
    offsets = bitmask_offsets(packed.bitmask, packed.in_features)
    if packed.values.ndim != 1 or packed.values.numel() != int(offsets[-1]):
        raise ValueError(
            f"corrupt packed weight: the bitmask keeps {int(offsets[-1])} elements but `values` has shape "
            f"{tuple(packed.values.shape)}; load the weight again"
        )
    if packed.values.device != packed.bitmask.device:
        raise ValueError(
            f"`values` is on {packed.values.device} and `bitmask` on {packed.bitmask.device}; move both to one device"
        )
    return offsets


def bitmask_expand_reference(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """The dense matrix in plain torch: zeros, with the values scattered in row-major order to where bits are set."""
    mask = unpack_bits(bitmask, in_features)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def bitmask_gather_reference(dense: Tensor, bitmask: Tensor) -> Tensor:
    """The kept elements of a dense matrix in plain torch."""
    return dense[unpack_bits(bitmask, dense.shape[1])]


def bitmask_expand(packed: PackedSparse) -> Tensor:
    """The dense matrix [out, in_features] of a packed one, differentiable with respect to its values.

    >>> packed = PackedSparse(torch.tensor([[0b101]], dtype=torch.uint8), torch.tensor([1.0, 2.0]), 3)
    >>> bitmask_expand(packed)
    tensor([[1., 0., 2.]])
    """
    result: Tensor = torch.ops.pykd.bitmask_expand(packed.values, packed.bitmask, packed.in_features)
    return result


def bitmask_gather(dense: Tensor, bitmask: Tensor, nnz: int) -> Tensor:
    """The `nnz` kept elements of a dense matrix in row-major order: the adjoint of `bitmask_expand`."""
    result: Tensor = torch.ops.pykd.bitmask_gather(dense, bitmask, nnz)
    return result


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _transfer(kernel: str, bitmask: Tensor, values: Tensor, dense: Tensor, offsets: Tensor) -> None:
    getattr(native, kernel)(
        bitmask.data_ptr(), offsets.data_ptr(), values.data_ptr(), dense.data_ptr(),
        dense.shape[1], dense.shape[0], dense.element_size(), num_threads(),
    )  # fmt: skip


def _has_kernel(tensor: Tensor) -> bool:
    return native is not None and tensor.device.type == "cpu" and tensor.element_size() in (2, 4)


def _expand(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    offsets = check_packed(PackedSparse(bitmask, values, in_features))
    if not _has_kernel(values):
        return bitmask_expand_reference(values, bitmask, in_features)
    dense = torch.empty(bitmask.shape[0], in_features, dtype=values.dtype)
    _transfer("bitmask_expand", bitmask.contiguous(), values.contiguous(), dense, offsets)
    return dense


def _gather(dense: Tensor, bitmask: Tensor, nnz: int) -> Tensor:
    if dense.ndim != 2 or dense.shape[0] != bitmask.shape[0]:
        raise ValueError(
            f"expected a matrix with the bitmask's {bitmask.shape[0]} rows; got shape {tuple(dense.shape)}"
        )
    offsets = bitmask_offsets(bitmask, dense.shape[1])
    if nnz != int(offsets[-1]):
        raise ValueError(f"the bitmask keeps {int(offsets[-1])} elements, not nnz={nnz}")
    if not _has_kernel(dense):
        return bitmask_gather_reference(dense, bitmask)
    values = torch.empty(nnz, dtype=dense.dtype)
    _transfer("bitmask_gather", bitmask.contiguous(), values, dense.contiguous(), offsets)
    return values


lib.define("bitmask_expand(Tensor values, Tensor bitmask, int in_features) -> Tensor")  # type: ignore[no-untyped-call]
lib.define("bitmask_gather(Tensor dense, Tensor bitmask, int nnz) -> Tensor")  # type: ignore[no-untyped-call]
torch.library.impl(lib, "bitmask_expand", "CompositeExplicitAutograd")(_expand)
torch.library.impl(lib, "bitmask_gather", "CompositeExplicitAutograd")(_gather)


@torch.library.register_fake("pykd::bitmask_expand", lib=lib)  # type: ignore[untyped-decorator]
def _(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    return values.new_empty(bitmask.shape[0], in_features)


@torch.library.register_fake("pykd::bitmask_gather", lib=lib)  # type: ignore[untyped-decorator]
def _(dense: Tensor, bitmask: Tensor, nnz: int) -> Tensor:
    return dense.new_empty(nnz)


def _save_expand(ctx, inputs, output):  # type: ignore[no-untyped-def]
    values, bitmask, _ = inputs
    ctx.nnz = values.shape[0]
    ctx.save_for_backward(bitmask)


def _backward_expand(ctx, grad):  # type: ignore[no-untyped-def]
    return bitmask_gather(grad, ctx.saved_tensors[0], ctx.nnz), None, None


def _save_gather(ctx, inputs, output):  # type: ignore[no-untyped-def]
    dense, bitmask, _ = inputs
    ctx.in_features = dense.shape[1]
    ctx.save_for_backward(bitmask)


def _backward_gather(ctx, grad):  # type: ignore[no-untyped-def]
    return bitmask_expand(PackedSparse(ctx.saved_tensors[0], grad, ctx.in_features)), None, None


torch.library.register_autograd("pykd::bitmask_expand", _backward_expand, setup_context=_save_expand, lib=lib)
torch.library.register_autograd("pykd::bitmask_gather", _backward_gather, setup_context=_save_gather, lib=lib)

for _op in ("bitmask_expand", "bitmask_gather"):
    TABLE.append(Route(_op, "cpu", "2- and 4-byte elements", "native" if native is not None else "reference"))
    TABLE.append(Route(_op, "any", "otherwise", "reference"))
