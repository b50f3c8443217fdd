"""Rounding a weight to 4 bits: group-wise int4, uint4, NF4 and FP4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.int4_r16 import dequantize, groups_of, holds_zero, pack_nibbles, table_of

#: Shares of a group's extremes that searches by importance try as the ends of the grid.
SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)

#: Shares that plain rounding begins to fit scales at, and how often it fits them.
STARTS = (1.0, 0.85)
FITS = 2


class FourBit(NamedTuple):
    """The canonical tensors: see `pykd.ops.int4_r16`. `zeros` is None except for `uint4`."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantize_4bit(weight: Tensor, *, code: str = "int4", group_size: int = 32) -> FourBit:
    """Round a dense weight [out_features, in_features] to 4-bit codes with one float16 scale per group of a row.

    int4: weight = (q - 8) * scale; uint4: (q - zero) * scale with an integer zero point; nf4 (Dettmers et al. 2023),
    fp4 and tables of your own (`pykd.ops.int4_r16.codebook_code`): table[q] * scale. Scales come from `fitted_scales`:
    no group's squared error is above that under the scale that just reaches the group's extremes, the usual one.
    Weights that are exactly zero stay so under every code. Codes are chosen for the scale as stored, float16.

    Raises ValueError for an unknown code, a weight that is not a non-empty matrix, NaN or infinite weights, weights
    whose scale float16 cannot hold, a group size below 1, and zeros among other weights of a group under a table that
    has no 0.0.

    >>> w = torch.tensor([[0.7, 0.0, -0.35]])
    >>> dequantize_4bit(quantize_4bit(w, group_size=32), code="int4", in_features=3, group_size=32)
    tensor([[ 0.7002, -0.0000, -0.3501]])
    """
    _check(weight, code, group_size)
    groups = split_groups(weight.detach().float(), group_size)
    scale, zero = fitted_scales(groups, code)
    if not holds_zero(code) and bool(((groups == 0) & (scale != 0)).flatten(1)[:, : weight.shape[1]].any()):
        raise ValueError(
            "the weight holds zeros, which a codebook without 0.0 cannot keep: put 0.0 into the table, or take another "
            "scheme for pruned layers"
        )
    levels = nearest_levels(groups, scale, zero, code=code).flatten(1)[:, : weight.shape[1]]
    zeros = None if zero is None else zero.squeeze(2)
    return from_levels(levels, scale.squeeze(2), zeros, code=code, group_size=group_size)


def split_groups(matrix: Tensor, group_size: int) -> Tensor:
    """[..., in_features] -> [..., groups, size], the last group filled up with zeros."""
    size, count, _, _ = groups_of(matrix.shape[-1], group_size)
    return F.pad(matrix, (0, size * count - matrix.shape[-1])).view(*matrix.shape[:-1], count, size)


def nearest_levels(values: Tensor, scale: Tensor, zero: Tensor | None = None, *, code: str) -> Tensor:
    """The level of the code's grid that is nearest to each value, float32: a weight is ``level * scale``.

    Levels are -8..7 (int4), -zero..15 - zero (uint4) or the entries of a table (nf4, fp4: the lower of two equally near
    ones). The scale, and for uint4 the zero point, broadcast to the values; a scale of 0 gives level 0.

    >>> nearest_levels(torch.tensor([0.26, -9.0]), torch.tensor(0.5), code="int4")
    tensor([ 1., -8.])
    """
    steps = torch.where(scale == 0, 0.0, values / scale)
    entries = table_of(code)
    if entries is not None:
        table = torch.tensor(entries, device=values.device).sort().values
        return table[torch.bucketize(steps, (table[1:] + table[:-1]) / 2)] + 0.0  # no -0.0
    if zero is None:
        return steps.round_().clamp_(-8, 7)
    return (steps.round_() + zero).clamp_(0, 15) - zero


def counted_levels(groups: Tensor, scale: Tensor, zero: Tensor | None, code: str) -> Tensor:
    """`nearest_levels` of groups [..., groups, size]; 0 where the last group was filled up, whatever the table."""
    levels = nearest_levels(groups, scale, zero, code=code)
    return levels if holds_zero(code) else levels.mul_(groups != 0)


def from_levels(levels: Tensor, scales: Tensor, zeros: Tensor | None, *, code: str, group_size: int) -> FourBit:
    """Canonical tensors from levels [out_features, in_features], as `nearest_levels` gives them, and their scales (and
    for uint4 zero points) [out_features, groups].

    >>> from_levels(torch.tensor([[7.0, 0.0]]), torch.tensor([[0.5]]), None, code="int4", group_size=2).qweight
    tensor([[143]], dtype=torch.uint8)
    """
    table = table_of(code)
    if table is not None:
        order = torch.tensor(table, device=levels.device).sort(stable=True)
        # the first of two equal levels in the table's order: one code of 0.0, never FP4's -0.0
        codes = order.indices[torch.searchsorted(order.values, levels.contiguous())]
    elif zeros is None:
        codes = levels + 8
    else:
        size = groups_of(levels.shape[1], group_size).size
        codes = levels + zeros.repeat_interleave(size, dim=1)[:, : levels.shape[1]]
        zeros = pack_nibbles(zeros.to(torch.uint8))
    return FourBit(pack_nibbles(codes.to(torch.uint8)), scales.half(), zeros)


def dequantize_4bit(tensors: FourBit, *, code: str, in_features: int, group_size: int) -> Tensor:
    """The dense float32 weight [out_features, in_features] that the codes stand for."""
    return dequantize(*tensors, code=code, in_features=in_features, group_size=group_size)


def _check(weight: Tensor, code: str, group_size: int) -> None:
    table = table_of(code)
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a non-empty floating-point matrix [out_features, in_features], got {weight.dtype} "
            f"{list(weight.shape)}: reshape it first"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}: use 32, 64, 128 or in_features")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values: repair or retrain the layer before quantizing it")
    limit = torch.finfo(torch.float16).max * (7 if table is None else min(max(table), -min(table)))
    if weight.abs().max() > limit:
        raise ValueError(f"weights above {limit:.0f} are too large for float16 scales of {code}: rescale the layer")


Scales = tuple[Tensor, Tensor | None]


def best_scales(groups: Tensor, candidates: Iterable[Scales], *, code: str, importance: Tensor | None = None) -> Scales:
    """Per group, the scale (and zero point) out of candidates with the least squared error, weighted by `importance`.

    groups: [..., groups, size]; candidates: pairs [..., groups, 1], of which the first wins ties; importance broadcasts
    to the groups. Raises ValueError when there is no candidate.
    """
    best: Scales | None = None
    best_error = groups.new_full((*groups.shape[:-1], 1), torch.inf)
    for scale, zero in candidates:
        difference = counted_levels(groups, scale, zero, code).mul_(scale).sub_(groups).square_()
        error = (difference if importance is None else difference.mul_(importance)).sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        kept = (scale, zero) if best is None else best
        chosen = None if zero is None or kept[1] is None else torch.where(better, zero, kept[1])
        best = torch.where(better, scale, kept[0]), chosen
    if best is None:
        raise ValueError("best_scales needs at least one candidate, got none")
    return best


def fitted_scales(groups: Tensor, code: str) -> Scales:
    """Scales by alternating least squares, [..., groups, 1]: levels for the scale, then the scale for the levels.

    ``s = <level, w> / <level, level>`` from every start, `FITS` times; each group keeps the grid with the least
    ``sum (w - level * s)^2`` that it has seen, beginning with the one that reaches its extremes. Scales are rounded to
    float16 before they are tried. Zero points (uint4) stay where the range of the group puts them.
    """
    best: Scales | None = None
    least = groups.new_full((*groups.shape[:-1], 1), torch.inf)
    for scale, zero in _starts(groups, code):
        for turn in range(FITS + 1):
            levels = counted_levels(groups, scale, zero, code)
            error = (levels * scale).sub_(groups).square_().sum(dim=-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = (scale if best is None else torch.where(better, scale, best[0])), zero
            if turn < FITS:
                length = levels.square().sum(dim=-1, keepdim=True)
                fit = (levels.mul_(groups)).sum(dim=-1, keepdim=True) / length
                scale = torch.where(length > 0, fit, scale).half().float()
    assert best is not None
    return best


def _starts(groups: Tensor, code: str) -> Iterator[Scales]:
    if code == "int4":
        yield from int4_scales(groups, STARTS)
        return
    scale, zero = range_scales(groups) if code == "uint4" else (table_scales(groups, code), None)
    for share in STARTS:
        yield (scale * share).half().float(), zero


def int4_scales(groups: Tensor, shares: Sequence[float] = SHRINK) -> Iterator[Scales]:
    """Float16 candidates for int4: shares of absmax / 7 (codes -8..7), and of signed absmax / -8, which lets the level
    -8 hold the largest weight."""
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    for divisor in (7.0, -8.0):
        for shrink in shares:
            yield ((largest.abs() if divisor > 0 else largest) * (shrink / divisor)).half().float(), None


def range_scales(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale = range / 15 over a range that includes 0, so that 0 is the integer zero point exactly."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    return scale, torch.where(scale == 0, 0.0, -low / scale).round_().clamp_(0, 15)


def table_scales(groups: Tensor, code: str) -> Tensor:
    """The least scale, [..., groups, 1], under which a table reaches the extremes of each group.

    For tables from -1 to 1 that is the largest magnitude.
    """
    table = table_of(code)
    assert table is not None
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    return torch.maximum(high / max(table), low / min(table)) + 0.0  # no -0.0
