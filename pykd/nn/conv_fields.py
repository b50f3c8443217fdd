"""What describes a convolution, and which of them are linear layers."""

from __future__ import annotations

from typing import Any

#: The arguments that describe a convolution, as `nn.Conv2d` names them.
FIELDS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def is_pointwise(conv: Any) -> bool:
    """Whether a convolution, dense or compressed, is a linear layer over the channels of every pixel.

    >>> from torch import nn
    >>> is_pointwise(nn.Conv2d(4, 8, 1, stride=2)), is_pointwise(nn.Conv2d(4, 8, 1, padding=1))
    (True, False)
    """
    return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")
