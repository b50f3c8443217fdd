"""GPTQ: codes that make up for each other's rounding errors, by the second moments of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pykd.calibration.hessian import check_hessian, damped, inverse_root, rows_of
from pykd.calibration.inputs import Inputs
from pykd.nn.codecs.four_bit import FourBit, Scales, nearest_levels, quantize_4bit
from pykd.ops.int4_r16 import table_of
from pykd.quantization.descent import descend
from pykd.quantization.grid import Grid
from pykd.quantization.output_error import better_rows

#: Columns whose errors are carried on at once: one matrix product instead of many vector products.
BLOCK = 128


def gptq(
    weight: Tensor,
    inputs: Inputs,
    *,
    code: str,
    group_size: int,
    damping: float = 0.01,
    activation_order: bool = True,
    passes: int = 3,
    sweeps: int = 2,
) -> FourBit:
    """Choose codes by the error of the layer's outputs (Frantar et al. 2022, GPTQ, algorithm 1).

    Minimises, row by row, ``e H e^T`` with e = weight - rounded weight and H = ``inputs.hessian``: the squared error of
    the output on the calibration inputs. Columns are rounded one after another, and the error of each moves the columns
    that are still to come: ``w[j:] -= (w_j - q_j) / U_jj * U[j, j:]`` with ``H^-1 = U^T U``.

    Beyond the paper: scales are searched under the weights diag(H) instead of taken from the largest weight; in every
    further pass they are fitted to the codes found so far, by least squares under H, and the codes chosen again; the
    codes of every pass are improved by coordinate descent (`descend`); and each row keeps the best of all passes and of
    plain rounding, so that no row's error is above that of `rtn`.

    Args:
        weight: [out_features, in_features], any floating-point dtype; exact zeros stay exactly zero.
        inputs: statistics with hessian [blocks, in_features, in_features]; out_features is a multiple of blocks.
        code: int4, uint4, nf4 or fp4.
        group_size: columns that share a scale; groups stay consecutive whatever the order of the columns.
        damping: share of the mean of diag(H) that is added to it, > 0; inputs that were never active count as that.
        activation_order: round the columns with the largest diag(H) first.
        passes: how often the codes are chosen, >= 1; 1 without sweeps is the paper's algorithm under searched scales.
        sweeps: of coordinate descent over all columns in each pass, >= 0.

    Raises ValueError for numbers out of range, a Hessian of another shape, and as `quantize_4bit` does.

    >>> x = torch.randn(64, 16) @ torch.randn(16, 16)
    >>> inputs = Inputs((x.T @ x / 32)[None], 64)
    >>> gptq(torch.randn(4, 16), inputs, code="int4", group_size=8).scales.shape
    torch.Size([4, 2])
    """
    if not damping > 0 or passes < 1 or sweeps < 0:
        raise ValueError(
            f"damping must be above 0, passes at least 1 and sweeps at least 0, got {damping}, {passes} and {sweeps}"
        )
    best = quantize_4bit(weight, code=code, group_size=group_size)
    columns, blocks = weight.shape[1], inputs.hessian.shape[0]
    check_hessian(weight, inputs.hessian)
    grid = Grid(code, group_size, columns)
    target = weight.detach().float().reshape(blocks, -1, columns)
    hessian = damped(inputs.hessian, damping)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if activation_order else None
    root = inverse_root(hessian, order)
    scales = grid.search(target, diagonal[:, None])
    for turn in range(passes):
        levels = _feedback(target, root, order, grid, scales)
        if sweeps:
            levels = _descended(target, hessian, grid, levels, scales, sweeps)
        best = better_rows(weight, inputs.hessian, grid.pack(levels, scales), best, grid)
        if turn < passes - 1:
            scales = _refit(target, hessian, grid, levels, scales)
    return best


def _feedback(target: Tensor, root: Tensor, order: Tensor | None, grid: Grid, scales: Scales) -> Tensor:
    """The levels of algorithm 1 for fixed scales. Works on columns as rows, so that each is contiguous."""
    work = _arranged(target, order)
    scale = _arranged(grid.spread(scales[0]), order)
    zero = None if scales[1] is None else _arranged(grid.spread(scales[1]), order)
    round_column = _rounding(grid.code, scale, zero, kept=work != 0)
    levels = torch.empty_like(work)
    for first in range(0, work.shape[1], BLOCK):
        last = min(first + BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, first:last])
        for column in range(first, last):
            value = work[:, column]
            level = round_column(column, value)
            levels[:, column] = level
            error = (value - level * scale[:, column]) / root[:, column, column, None]
            errors[:, column - first] = error
            rest = slice(column + 1, last)
            work[:, rest].baddbmm_(root[:, column, rest, None], error[:, None], alpha=-1)
        work[:, last:].baddbmm_(root[:, first:last, last:].transpose(1, 2), errors, alpha=-1)
    if order is not None:
        levels = rows_of(levels, order.argsort(dim=1))
    return levels.transpose(1, 2).contiguous()


def _descended(target: Tensor, hessian: Tensor, grid: Grid, levels: Tensor, scales: Scales, sweeps: int) -> Tensor:
    """The levels after coordinate descent from these, under the same scales."""
    turned, scale = _arranged(target, None), _arranged(grid.spread(scales[0]), None)
    zero = None if scales[1] is None else _arranged(grid.spread(scales[1]), None)
    rounds = _rounding(grid.code, scale, zero, kept=turned != 0)
    found = descend(turned, hessian, _arranged(levels, None), scale, rounds, sweeps=sweeps)
    return found.transpose(1, 2).contiguous()


def _rounding(code: str, scale: Tensor, zero: Tensor | None, *, kept: Tensor) -> Callable[[int, Tensor], Tensor]:
    """`nearest_levels` one column at a time, with what is the same for all of them prepared; 0 where not kept."""
    kept = kept & (scale != 0)
    divisor = scale.masked_fill(scale == 0, 1.0)
    if table_of(code) is not None:
        return lambda column, value: nearest_levels(value, divisor[:, column], code=code) * kept[:, column]
    low, high = (-8.0, 7.0) if zero is None else (-zero, 15.0 - zero)
    low, high = low * kept, high * kept
    return lambda column, value: (value / divisor[:, column]).round_().clamp_(low[:, column], high[:, column])


def _refit(target: Tensor, hessian: Tensor, grid: Grid, levels: Tensor, scales: Scales) -> Scales:
    """Least-squares scales for fixed levels, one group after another: s_g += (L_g . (e H)_g) / (L_g H_gg L_g^T)."""
    scale = scales[0].clone()
    error = target - levels * grid.spread(scale)
    pull = error @ hessian
    for group, span in enumerate(grid.slices()):
        part = levels[:, :, span]
        curvature = ((part @ hessian[:, span, span]) * part).sum(dim=2)
        old = scale[:, :, group]
        new = old + torch.where(curvature > 0, (part * pull[:, :, span]).sum(dim=2) / curvature, 0.0)
        new = torch.where((new / old - 1).abs() <= 0.5, new, old).half().float()  # never through zero
        pull.baddbmm_(part * (new - old)[:, :, None], hessian[:, span], alpha=-1)
        scale[:, :, group] = new
    return scale, scales[1]


def _arranged(matrix: Tensor, order: Tensor | None) -> Tensor:
    """[blocks, rows, columns] -> [blocks, columns in this order, rows], a copy."""
    turned = matrix.transpose(1, 2).contiguous()
    return turned.clone() if order is None else rows_of(turned, order)
