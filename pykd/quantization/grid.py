"""The 4-bit grid of a weight matrix, as the methods work on it: levels, and scales and zero points per group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pykd.nn.codecs.four_bit import (
    SHRINK,
    FourBit,
    Scales,
    best_scales,
    from_levels,
    int4_scales,
    nearest_levels,
    range_scales,
    split_groups,
    table_scales,
)
from pykd.ops.int4_r16 import groups_of, unpack_nibbles


class Grid(NamedTuple):
    """Code and groups of matrices [..., in_features]; scales and zero points are float32 [..., groups].

    >>> grid = Grid("int4", 32, 64)
    >>> scale, zero = grid.search(torch.randn(8, 64))
    >>> scale.shape
    torch.Size([8, 2])
    """

    code: str
    group_size: int
    in_features: int

    def spread(self, per_group: Tensor) -> Tensor:
        """[..., groups] -> [..., in_features]."""
        size = groups_of(self.in_features, self.group_size).size
        return per_group.repeat_interleave(size, dim=-1)[..., : self.in_features]

    def slices(self) -> list[slice]:
        """The columns of each group."""
        size = groups_of(self.in_features, self.group_size).size
        return [slice(k, min(k + size, self.in_features)) for k in range(0, self.in_features, size)]

    def search(self, weight: Tensor, importance: Tensor | None = None) -> Scales:
        """Scales with the least sum of importance * (weight - rounded)^2 over each group, out of a small search.

        importance: like weight, or broadcasting to it ([blocks, 1, in_features] for [blocks, rows, in_features]).
        """
        groups = split_groups(weight, self.group_size)
        weights = None if importance is None else split_groups(importance, self.group_size)
        scale, zero = best_scales(groups, self.candidates(groups), code=self.code, importance=weights)
        return scale.squeeze(-1), None if zero is None else zero.squeeze(-1)

    def levels(self, weight: Tensor, scales: Scales) -> Tensor:
        """The nearest level of every weight."""
        scale, zero = scales
        spread_zero = None if zero is None else self.spread(zero)
        return nearest_levels(weight, self.spread(scale), spread_zero, code=self.code)

    def pack(self, levels: Tensor, scales: Scales) -> FourBit:
        """Canonical tensors of [blocks, rows, in_features]."""
        scale, zero = scales
        zeros = None if zero is None else zero.flatten(0, -2)
        return from_levels(
            levels.flatten(0, -2), scale.flatten(0, -2), zeros, code=self.code, group_size=self.group_size
        )

    def scales(self, tensors: FourBit, blocks: int = 1) -> Scales:
        """The scales and zero points of canonical tensors, as [blocks, rows, groups]."""
        scale = tensors.scales.float().view(blocks, -1, tensors.scales.shape[1])
        if tensors.zeros is None:
            return scale, None
        return scale, unpack_nibbles(tensors.zeros, scale.shape[2]).float().view(scale.shape)

    def candidates(self, groups: Tensor) -> Iterator[Scales]:
        """The scales (and zero points), float16 in float32, that searches try for [..., groups, size]."""
        if self.code == "int4":
            yield from int4_scales(groups)
        elif self.code == "uint4":
            yield from _uint4_scales(groups)
        else:
            largest = table_scales(groups, self.code)
            for shrink in SHRINK:
                yield (largest * shrink).half().float(), None


def _uint4_scales(groups: Tensor) -> Iterator[Scales]:
    """The whole range, and shorter ones that clip at either end."""
    scale, zero = range_scales(groups)
    for shrink in SHRINK:
        shorter = (scale * shrink).half().float()
        exact = torch.where(shorter == 0, zero, zero * scale / shorter)
        for moved in (0.0, 0.5, 1.0):  # share of the clipped levels that is cut from the negative end
            yield shorter, (exact - moved * 15 * (1 / shrink - 1)).round().clamp(0, 15)
