"""The 4-bit linear layer in plain torch: the measure of the kernels of `linear_4bit`, and the way of other devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.activation import activate
from pykd.ops.int4_r16 import dequantize, groups_of, unpack_r16
from pykd.ops.linear_8bit import quantize_rows

#: How activations enter the products: as they are, or rounded to int8 with a scale per row and group.
INPUTS: dict[str, bool] = {"keep": False, "int8": True}


def quantize_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of activations [rows, in_features]: int8 in -127..127, and float32 scales [rows, groups].

    Each group of a row as a row in `pykd.ops.linear_8bit.quantize_rows`: scale = absmax / 127, NaN where the group
    holds NaN or infinity.
    """
    size, groups, _, _ = groups_of(x.shape[1], group_size)
    padded = F.pad(x, (0, size * groups - x.shape[1]))
    codes, scales = quantize_rows(padded.reshape(-1, size))
    return codes.view(padded.shape)[:, : x.shape[1]], scales.view(x.shape[0], groups)


def rounded(x: Tensor, group_size: int) -> Tensor:
    """x as `quantize_groups` leaves it: code * scale, in float32 or float64."""
    codes, scales = quantize_groups(x.reshape(-1, x.shape[-1]), group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    size = groups_of(x.shape[-1], group_size).size
    return (codes.to(wide) * scales.to(wide).repeat_interleave(size, dim=1)[:, : x.shape[-1]]).view(x.shape)


def linear_4bit_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    group_size: int,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    """activation(x W^T + bias) in float32 (or float64, as x) with the dequantized weight; the result in x's dtype."""
    weight = dequantize(qweight, scales, zeros, code=code, in_features=x.shape[-1], group_size=group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    value = rounded(x, group_size) if INPUTS[inputs] else x.to(wide)
    y = F.linear(value, weight.to(wide), None if bias is None else bias.to(wide))
    return activate(y, activation).to(x.dtype)


def reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    out_features: int,
    group_size: int,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    """What the op does where no kernel serves it: `linear_4bit_reference` for canonical tensors or the CPU layout."""
    if scales is None:
        qweight, scales, zeros = unpack_r16(
            qweight, out_features=out_features, in_features=x.shape[-1], group_size=group_size, code=code
        )
    return linear_4bit_reference(x, qweight, scales, zeros, bias, code, group_size, inputs, activation)
