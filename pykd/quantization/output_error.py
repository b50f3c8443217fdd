"""The error that rounding a weight makes in the layer's outputs, by the second moments of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykd.nn.codecs.four_bit import FourBit, dequantize_4bit
from pykd.quantization.grid import Grid


def output_error(weight: Tensor, tensors: FourBit, hessian: Tensor, *, code: str, group_size: int) -> Tensor:
    """``e H e^T`` per row, [out_features], e = weight - rounded: twice the mean squared error of each output."""
    dense = dequantize_4bit(tensors, code=code, in_features=weight.shape[1], group_size=group_size)
    error = (weight.detach().float() - dense).reshape(hessian.shape[0], -1, weight.shape[1])
    result: Tensor = ((error @ hessian) * error).sum(dim=2).flatten()
    return result


def better_rows(weight: Tensor, hessian: Tensor, found: FourBit, best: FourBit, grid: Grid) -> FourBit:
    """Each row from whichever has the smaller output error; `best` where they are equal."""
    options: Any = {"code": grid.code, "group_size": grid.group_size}
    error, least = (output_error(weight, tensors, hessian, **options) for tensors in (found, best))
    wins = (error < least)[:, None]
    zeros = None if found.zeros is None or best.zeros is None else torch.where(wins, found.zeros, best.zeros)
    return FourBit(torch.where(wins, found.qweight, best.qweight), torch.where(wins, found.scales, best.scales), zeros)
