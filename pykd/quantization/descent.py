"""Coordinate descent: one level after another, each the best while all others stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Columns whose changes are carried on at once: one matrix product instead of many vector products.
BLOCK = 128

#: (column, values [blocks, rows]) -> the nearest levels of that column.
Round = Callable[[int, Tensor], Tensor]


def descend(
    target: Tensor, hessian: Tensor, levels: Tensor, scale: Tensor, round_column: Round, *, sweeps: int
) -> Tensor:
    """Levels with a smaller or equal ``e H e^T``, e = target - levels * scale, per row (Behdin et al. 2023, QuantEase).

    Column after column takes the level next to the value at which the error of the outputs would be least if all other
    columns stayed: ``target_j + (e H)_j / H_jj - e_j``. GPTQ makes up for an error in the columns still to come only;
    here those that came before do their part.

    target, levels, scale: [blocks, columns, rows], columns as rows, so that each is contiguous; hessian: [blocks,
    columns, columns], columns in the same order. Returns new levels.
    """
    levels = levels.clone()
    error = target - levels * scale
    pull = hessian @ error  # of every column: (e H)_j
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        for first in range(0, levels.shape[1], BLOCK):
            last = min(first + BLOCK, levels.shape[1])
            changes = torch.empty_like(error[:, first:last])
            for column in range(first, last):
                ideal = target[:, column] - error[:, column] + pull[:, column] / diagonal[:, column, None]
                level = round_column(column, ideal)
                change = (levels[:, column] - level) * scale[:, column]  # of the error
                levels[:, column] = level
                error[:, column] += change
                changes[:, column - first] = change
                pull[:, first:last].baddbmm_(hessian[:, first:last, column, None], change[:, None])
            pull[:, :first].baddbmm_(hessian[:, :first, first:last], changes)
            pull[:, last:].baddbmm_(hessian[:, last:, first:last], changes)
    return levels
