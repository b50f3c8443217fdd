"""Schemes: how one layer becomes a packed one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pykd.nn import (
    CompressedModule,
    Conv2d4bit,
    Conv2d8bit,
    Conv2d16bit,
    Linear4bit,
    Linear8bit,
    Linear16bit,
)
from pykd.nn.codecs.four_bit import FourBit
from pykd.nn.conv_fields import is_pointwise
from pykd.nn.linear_8bit import StaticInput

#: (dense layer, group size) -> packed layer: what a caller may give instead of the name of a scheme.
Scheme = Callable[[nn.Module, int], CompressedModule]

#: Name -> how weights are stored. Activations: as they are, but for w4a8, w8a8 and w8a8_static, which round them to 8
#: bits at each call (in convolutions: only where the kernel is 1x1), the last one under a scale that calibration chose.
#: nf4: quantiles of the normal distribution (Dettmers et al. 2023).
SCHEMES: dict[str, str] = {
    "w4a16": "4 bits, whole numbers",
    "w4a8": "4 bits, whole numbers",
    "nf4": "4 bits, a table",
    "fp4": "4 bits, floating point",
    "w8a8": "8 bits, whole numbers",
    "w8a8_static": "8 bits, whole numbers",
    "w8a16": "8 bits, whole numbers",
    "bf16": "16 bits, floating point",
    "fp16": "16 bits, floating point",
}


def four_bit(layer: nn.Module, tensors: FourBit, *, scheme: str, group_size: int, symmetric: bool) -> CompressedModule:
    """The packed form of an nn.Linear or nn.Conv2d with these codes."""
    if isinstance(layer, nn.Conv2d):
        return Conv2d4bit.from_codes(layer, tensors, scheme=scheme, group_size=group_size, symmetric=symmetric)
    assert isinstance(layer, nn.Linear)
    return Linear4bit.from_codes(layer, tensors, scheme=scheme, group_size=group_size, symmetric=symmetric)


def eight_bit(layer: nn.Module, scheme: str, static: StaticInput | None = None) -> CompressedModule:
    """The packed form of a layer in 8 bits with a scale per output.

    scheme: "w8a8" (activations are rounded to 8 bits at each call, with a scale per row), "w8a8_static" (as `static`
    says; convolutions that are not 1x1 keep them) or "w8a16" (they are kept).
    """
    if isinstance(layer, nn.Conv2d):
        if static is not None and not is_pointwise(layer):
            return Conv2d8bit.from_conv2d(layer, scheme="w8a16")
        return Conv2d8bit.from_conv2d(layer, scheme=scheme, static=static)
    assert isinstance(layer, nn.Linear)
    return Linear8bit.from_linear(layer, scheme=scheme, static=static)


def sixteen_bit(layer: nn.Module, scheme: str) -> CompressedModule:
    """The form of a layer that is stored in bfloat16 or float16."""
    if isinstance(layer, nn.Conv2d):
        return Conv2d16bit.from_conv2d(layer, scheme=scheme)
    assert isinstance(layer, nn.Linear)
    return Linear16bit.from_linear(layer, scheme=scheme)
