"""HQQ: scales and zero points that leave few weights with a large error, without any data."""

from __future__ import annotations

import torch
from torch import Tensor

from pykd.calibration.inputs import Inputs
from pykd.nn.codecs.four_bit import FourBit, Scales, counted_levels, quantize_4bit, split_groups
from pykd.quantization.grid import Grid


def hqq(
    weight: Tensor,
    inputs: Inputs | None = None,
    *,
    code: str,
    group_size: int,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> FourBit:
    """Half-quadratic quantization (Badri and Shaji 2023): the grid with the least ``sum |w - q(w)|^norm`` per group.

    A norm below 1 forgives a few large errors, those of outliers, for the sake of all other weights. An auxiliary error
    E splits the problem in two that have solutions, and they take turns, in units of the scale s::

        E    = sign(d) * max(0, |d| - |d|^(norm - 1) / beta),    d = (w - q(w)) / s
        zero = mean(q - (w / s - E)),    beta = growth * beta

    Beyond the paper, which leaves the scale alone: it is fitted to the same target by least squares, ``s = <level,
    w - s E> / <level, level>``; that is all there is to fit for the codes without a zero point (int4, nf4, fp4). Zero
    points are whole numbers here, so that 0.0 stays exact. Every step is measured with scales in float16 as stored, and
    each group keeps the best grid seen, from plain rounding on: no group's norm is above that of `rtn`.

    Args:
        weight: [out_features, in_features], any floating-point dtype; exact zeros stay exactly zero.
        inputs: not read.
        code: int4, uint4, nf4 or fp4.
        group_size: columns that share a scale.
        norm: exponent of the error, 0 < norm <= 1.
        beta, growth: weight of the coupling, > 0, and what multiplies it at each iteration, >= 1.
        iterations: turns, >= 1.

    Raises ValueError for these numbers out of range, and as `quantize_4bit` does.

    >>> hqq(torch.randn(4, 16), code="uint4", group_size=8).scales.shape
    torch.Size([4, 2])
    """
    if not (0 < norm <= 1 and beta > 0 and growth >= 1 and iterations >= 1):
        raise ValueError(
            f"norm lies in (0, 1], beta above 0, growth and iterations at 1 or above, got norm={norm}, beta={beta}, "
            f"growth={growth}, iterations={iterations}"
        )
    plain = quantize_4bit(weight, code=code, group_size=group_size)
    grid = Grid(code, group_size, weight.shape[1])
    target = weight.detach().float()[None]
    groups = split_groups(target, group_size)
    best: Scales = _apart(grid.scales(plain))
    least = _norm(groups, best, code, norm)
    for start in (best, _apart(grid.search(target))):
        scales, coupling = start, beta
        for _ in range(iterations):
            better = (value := _norm(groups, scales, code, norm)) < least
            least = torch.where(better, value, least)
            zero = None if best[1] is None or scales[1] is None else torch.where(better, scales[1], best[1])
            best = torch.where(better, scales[0], best[0]), zero
            scales, coupling = _turn(groups, scales, code, norm, coupling), coupling * growth
    found = best[0].squeeze(-1), None if best[1] is None else best[1].squeeze(-1)
    return grid.pack(grid.levels(target, found), found)


def _apart(scales: Scales) -> Scales:
    """[..., groups] -> [..., groups, 1]."""
    return scales[0][..., None], None if scales[1] is None else scales[1][..., None]


def _norm(groups: Tensor, scales: Scales, code: str, norm: float) -> Tensor:
    """sum |w - q(w)|^norm of every group, [..., groups, 1]."""
    rounded = counted_levels(groups, *scales, code) * scales[0]
    return (groups - rounded).abs_().pow_(norm).sum(dim=-1, keepdim=True)


def _turn(groups: Tensor, scales: Scales, code: str, norm: float, beta: float) -> Scales:
    """One turn: the auxiliary error, then zero point and scale fitted to the weights without it."""
    scale, zero = scales
    levels = counted_levels(groups, scale, zero, code)
    steps = torch.where(scale == 0, 0.0, groups / scale)
    error = steps - levels
    size = error.abs()
    target = steps - error.sign() * (size - size.pow(norm - 1) / beta).clamp_(min=0)
    if zero is not None:
        kept = groups != 0  # zeros and the filling are exact under every zero point
        moved = torch.where(kept, levels - target, 0.0).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
        new_zero = (zero + moved).round_().clamp_(0, 15)
        levels, zero = torch.where(kept, levels + zero - new_zero, 0.0), new_zero
    length = levels.square().sum(-1, keepdim=True)
    factor = torch.where(length > 0, (levels * target).sum(-1, keepdim=True) / length, 1.0)
    return (scale * factor.clamp_(0.5, 2.0)).half().float(), zero
