"""Rounding a weight to int8 with one float32 scale per output, or per group of inputs of an output."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.int4_r16 import groups_of


class EightBit(NamedTuple):
    """`qweight` int8 [out_features, in_features] in -127..127; `scales` float32 [out_features], or [.., groups]."""

    qweight: Tensor
    scales: Tensor


def quantize_8bit(weight: Tensor, *, group_size: int | None = None) -> EightBit:
    """Round each row of a dense weight to int8: q = round(w / s), s = absmax / 127; zeros stay exactly zero.

    group_size: so many inputs of a row share a scale, the last ones of a row may be fewer; None: the whole row.

    Raises ValueError for a weight that is not a non-empty floating-point matrix, for NaN or infinite weights, and for a
    group size below 1.

    >>> quantize_8bit(torch.tensor([[1.0, 0.0, -0.5]])).qweight
    tensor([[127,   0, -64]], dtype=torch.int8)
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a non-empty floating-point matrix [out_features, in_features], got {weight.dtype} "
            f"{list(weight.shape)}: reshape it first"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values: repair or retrain the layer before quantizing it")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for the whole row, got {group_size}")
    wide = weight.detach().float()
    if group_size is None:
        scales = wide.abs().amax(1) / 127
    else:
        size, groups, _, _ = groups_of(wide.shape[1], group_size)
        padded = F.pad(wide, (0, size * groups - wide.shape[1]))
        scales = padded.view(len(wide), groups, size).abs().amax(2) / 127
    spread = _spread(scales, wide.shape[1], group_size)
    safe = torch.where(spread == 0, 1.0, spread)
    return EightBit((wide / safe).round_().clamp_(-127, 127).to(torch.int8), scales)


def dequantize_8bit(tensors: EightBit, *, group_size: int | None = None) -> Tensor:
    """The dense float32 weight that the codes stand for."""
    return tensors.qweight.float() * _spread(tensors.scales, tensors.qweight.shape[1], group_size)


def _spread(scales: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """[out, in], or [out, 1] for a scale per row."""
    if group_size is None:
        return scales.unsqueeze(1)
    return scales.repeat_interleave(groups_of(in_features, group_size).size, dim=1)[:, :in_features]
