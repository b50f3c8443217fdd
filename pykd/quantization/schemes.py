"""Schemes: how one layer becomes a packed one."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pykd.nn import CompressedModule, Conv2d4bit, Conv2d8bit, Linear4bit, Linear8bit

#: (dense layer, group size) -> packed layer
Scheme = Callable[[nn.Module, int], CompressedModule]


def four_bit(code: str) -> Scheme:
    """Weights in 4 bits, a 16-bit scale per group of inputs; activations stay as they are.

    code: "w4a16" (whole numbers -8..7), "nf4" (quantiles of the normal distribution; Dettmers et al. 2023) or "fp4".
    """

    def pack(layer: nn.Module, group_size: int) -> CompressedModule:
        if isinstance(layer, nn.Conv2d):
            return Conv2d4bit.from_conv2d(layer, scheme=code, group_size=group_size)
        assert isinstance(layer, nn.Linear)
        return Linear4bit.from_linear(layer, scheme=code, group_size=group_size)

    return pack


def eight_bit(layer: nn.Module, group_size: int) -> CompressedModule:
    """Weights in 8 bits with a scale per output, activations rounded to 8 bits at each call (dynamic, per row)."""
    if isinstance(layer, nn.Conv2d):
        return Conv2d8bit.from_conv2d(layer)
    assert isinstance(layer, nn.Linear)
    return Linear8bit.from_linear(layer)


#: Name -> scheme.
SCHEMES: dict[str, Scheme] = {
    "w4a16": four_bit("w4a16"),
    "nf4": four_bit("nf4"),
    "fp4": four_bit("fp4"),
    "w8a8": eight_bit,
}
