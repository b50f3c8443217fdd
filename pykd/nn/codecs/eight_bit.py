"""Rounding a weight to int8 with one float32 scale per output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EightBit(NamedTuple):
    """`qweight` int8 [out_features, in_features] in -127..127; `scales` float32 [out_features]."""

    qweight: Tensor
    scales: Tensor


def quantize_8bit(weight: Tensor) -> EightBit:
    """Round each row of a dense weight to int8: q = round(w / s), s = absmax / 127; zeros stay exactly zero.

    Raises ValueError for a weight that is not a non-empty floating-point matrix, and for NaN or infinite weights.

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
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / 127
    safe = torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    return EightBit((wide / safe).round_().clamp_(-127, 127).to(torch.int8), scales)


def dequantize_8bit(tensors: EightBit) -> Tensor:
    """The dense float32 weight that the codes stand for."""
    return tensors.qweight.float() * tensors.scales.unsqueeze(1)
