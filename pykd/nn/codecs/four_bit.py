"""Rounding a weight to 4 bits: group-wise int4, uint4, NF4 and FP4."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.errors import nearest
from pykd.ops.int4_r16 import CODEBOOKS, CODES, dequantize, groups_of, pack_nibbles

#: Shares of the largest magnitude that the int4 scale search tries as the value of code 15 (7) or 0 (-8).
SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


class FourBit(NamedTuple):
    """The canonical tensors: see `pykd.ops.int4_r16`. `zeros` is None except for `uint4`."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantize_4bit(weight: Tensor, *, code: str = "int4", group_size: int = 32) -> FourBit:
    """Round a dense weight [out_features, in_features] to 4-bit codes with one float16 scale per group of a row.

    int4: weight = (q - 8) * scale; uint4: (q - zero) * scale with an integer zero point; nf4 (Dettmers et al. 2023)
    and fp4: table[q] * scale, scale = the group's largest magnitude. For int4 the scale is the one with the smallest
    squared error out of a small search (`SHRINK`, both signs), which lets the level -8 hold the largest weight.
    Weights that are exactly zero stay exactly zero under every code. Codes are chosen for the scale as stored, float16.

    Raises ValueError for an unknown code, a weight that is not a non-empty matrix, NaN or infinite weights, weights
    whose scale float16 cannot hold, and a group size below 1.

    >>> w = torch.tensor([[0.7, 0.0, -0.35]])
    >>> dequantize_4bit(quantize_4bit(w, group_size=32), code="int4", in_features=3, group_size=32)
    tensor([[ 0.7002,  0.0000, -0.3501]])
    """
    _check(weight, code, group_size)
    size, count, _, _ = groups_of(weight.shape[1], group_size)
    padded = F.pad(weight.detach().float(), (0, size * count - weight.shape[1])).view(-1, count, size)
    zeros = None
    if code == "int4":
        codes, scales = _int4(padded)
    elif code == "uint4":
        codes, scales, zeros = _uint4(padded)
    else:
        codes, scales = _codebook(padded, torch.tensor(CODEBOOKS[code], device=weight.device))
    packed = pack_nibbles(codes.flatten(1)[:, : weight.shape[1]])
    return FourBit(packed, scales, None if zeros is None else pack_nibbles(zeros))


def dequantize_4bit(tensors: FourBit, *, code: str, in_features: int, group_size: int) -> Tensor:
    """The dense float32 weight [out_features, in_features] that the codes stand for."""
    return dequantize(*tensors, code=code, in_features=in_features, group_size=group_size)


def _check(weight: Tensor, code: str, group_size: int) -> None:
    if code not in CODES:
        raise ValueError(nearest("4-bit code", code, CODES))
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a non-empty floating-point matrix [out_features, in_features], got {weight.dtype} "
            f"{list(weight.shape)}: reshape it first"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}: use 32, 64, 128 or in_features")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values: repair or retrain the layer before quantizing it")
    limit = torch.finfo(torch.float16).max * (1 if code in CODEBOOKS else 7)
    if weight.abs().max() > limit:
        raise ValueError(f"weights above {limit:.0f} are too large for float16 scales of {code}: rescale the layer")


def _divide(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale, 0 where a group is all zero or too small for a float16 scale."""
    return torch.where(scale == 0, 0.0, weight / scale)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Best of absmax / 7 shrunk (codes -8..7) and of signed absmax / -8 shrunk, by squared error."""
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.zeros_like(largest)
    for divisor in (7.0, -8.0):
        for shrink in SHRINK:
            scale = ((largest.abs() if divisor > 0 else largest) * (shrink / divisor)).half().float()
            rounded = _divide(groups, scale).round_().clamp_(-8, 7).mul_(scale)
            error = (rounded - groups).square_().sum(dim=2, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    codes = (_divide(groups, best_scale).round().clamp(-8, 7) + 8).to(torch.uint8)
    return codes, best_scale.squeeze(2).half()


def _uint4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale = range / 15 over a range that includes 0, so that 0 is the integer zero point exactly."""
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = _divide(-low, scale).round_().clamp_(0, 15)
    codes = (_divide(groups, scale).round() + zero).clamp(0, 15).to(torch.uint8)
    return codes, scale.squeeze(2).half(), zero.squeeze(2).to(torch.uint8)


def _codebook(groups: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest entry of the table (the lower of two equally near) under the largest magnitude as scale."""
    scale = groups.abs().amax(dim=2, keepdim=True).half().float()
    order = table.sort(stable=True)
    middles = (order.values[1:] + order.values[:-1]) / 2
    codes = order.indices[torch.bucketize(_divide(groups, scale), middles)]
    codes = torch.where(table[codes] == 0, (table == 0).nonzero()[0], codes)  # one code of 0.0, never FP4's -0.0
    return codes.to(torch.uint8), scale.squeeze(2).half()
