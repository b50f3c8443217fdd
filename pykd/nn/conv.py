"""Convolutions with 4-, 8- and 16-bit weights: stored packed; 1x1 ones compute packed, others unpack at load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.nn.compressed import CompressedModule, empty_bias
from pykd.nn.conv_fields import FIELDS, is_pointwise
from pykd.nn.linear_4bit import Weight4bit
from pykd.nn.linear_8bit import StaticInput, Weight8bit, static_of
from pykd.nn.linear_16bit import Weight16bit


class CompressedConv2d(CompressedModule):
    """What compressed convolutions share: the weight is a matrix [out_channels, in_channels / groups * kh * kw].

    A 1x1 convolution without groups and padding is a linear layer over the channels of every pixel and computes from
    the packed weight. Any other keeps the packed tensors for files and a dense weight, unpacked once, to compute with.
    """

    dense: Tensor
    bias: nn.Parameter | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _matrix: Callable[[], Tensor]
    _multiply: Callable[..., Tensor]
    _spec: Callable[[], dict[str, Any]]

    def _describe(self, fields: dict[str, Any]) -> None:
        for name in FIELDS:
            value = fields[name]
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.register_parameter("bias", None)

    @property
    def pointwise(self) -> bool:
        """Whether this is a linear layer over channels."""
        return is_pointwise(self)

    def spec(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in FIELDS}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"type": type(self).__name__, **lists, "bias": self.bias is not None, **self._spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        make: Any = cls  # the packed forms take their description and have tensors to fill
        layer: Self = make(spec)
        make._register_empty(layer, spec, device)
        empty_bias(layer, spec, device)
        return layer

    def dequantize(self) -> Tensor:
        return self._matrix().view(self.out_channels, -1, *self.kernel_size)

    def to_dense(self) -> nn.Conv2d:
        return self.to_conv2d()

    def to_conv2d(self) -> nn.Conv2d:
        """The ordinary convolution with the dequantized weight; shares the bias."""
        fields = {name: getattr(self, name) for name in FIELDS}
        dense = nn.Conv2d(**fields, bias=self.bias is not None, device="meta", dtype=self.dtype)
        dense.weight = nn.Parameter(self.dequantize())
        dense.register_parameter("bias", self.bias)
        return dense

    def _pack(self) -> None:
        if self.pointwise:
            super()._pack()
        elif "dense" not in self._buffers:
            self.register_buffer("dense", self.dequantize(), persistent=False)

    def _unpack(self) -> None:
        if self.pointwise:
            super()._unpack()
        elif "dense" in self._buffers:
            del self.dense

    def _canonical(self) -> dict[str, Tensor]:
        return super()._canonical() if self.pointwise else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.dtype
        super()._apply(fn, recurse)
        if "dense" in self._buffers and self.dtype != before:  # made anew, not rounded twice
            self._unpack()
            self._pack()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise:
            pixels = x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)
            return self._multiply(pixels, self.bias).movedim(-1, -3)
        weight = self._buffers.get("dense")
        weight = self.dequantize() if weight is None else weight
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border(), mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _border(self) -> list[int]:
        """Padding of the last dimension first, before and after, as F.pad takes it."""
        if not isinstance(self.padding, str):
            return [side for size in reversed(self.padding) for side in (size, size)]
        total = [
            d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)
        ]
        return [side for size in reversed(total) for side in (size // 2, size - size // 2)]

    def extra_repr(self) -> str:
        shown = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        fields = [f"{name}={getattr(self, name)}" for name in shown]
        return ", ".join([*fields, *(f"{name}={value}" for name, value in self._spec().items() if name != "dtype")])


def _columns(fields: dict[str, Any]) -> int:
    kh, kw = fields["kernel_size"]
    return int(fields["in_channels"] // fields["groups"] * kh * kw)


class Conv2d4bit(CompressedConv2d, Weight4bit):
    """`nn.Conv2d` with a 4-bit weight (schemes as in `Linear4bit`); with "w4a8" a 1x1 one rounds the channels of every
    pixel to int8, and others, which compute from a dense weight, keep their activations.

    >>> conv = Conv2d4bit.from_conv2d(nn.Conv2d(8, 16, 1), scheme="w4a16", group_size=32)
    >>> conv(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 16, 5, 5])
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        """From a description: every field of `spec()` but the type; `from_conv2d` is the usual way."""
        group_size, symmetric = fields["group_size"], fields["symmetric"]
        super().__init__(fields["out_channels"], _columns(fields), fields["scheme"], group_size, symmetric)
        self._describe(fields)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, scheme: str = "w4a16", group_size: int | None = 32, symmetric: bool = True
    ) -> Self:
        """Quantize a convolution by plain rounding; groups run along in_channels / groups * kh * kw."""
        fields = {name: getattr(conv, name) for name in FIELDS}
        layer = cls({**fields, "scheme": scheme, "group_size": group_size, "symmetric": symmetric})
        matrix = conv.weight.detach().flatten(1)
        return layer._fill(conv, quantize_4bit(matrix, code=layer.code, group_size=layer.group_size))

    @classmethod
    def from_codes(
        cls,
        conv: nn.Conv2d,
        tensors: FourBit,
        *,
        scheme: str = "w4a16",
        group_size: int | None = 32,
        symmetric: bool = True,
    ) -> Self:
        """The layer with codes that were chosen elsewhere for the rows [out_channels, in_channels / groups * kh * kw],
        and the bias of `conv`; tensors and errors as in `Linear4bit.from_codes`."""
        fields = {name: getattr(conv, name) for name in FIELDS}
        layer = cls({**fields, "scheme": scheme, "group_size": group_size, "symmetric": symmetric})
        return layer._fill(conv, tensors)

    def _fill(self, conv: nn.Conv2d, tensors: FourBit) -> Self:
        self._take(tensors, conv.weight.dtype)
        self.bias = cast("nn.Parameter | None", conv.bias)
        self.train(conv.training)
        self.finalize()
        return self


class Conv2d8bit(CompressedConv2d, Weight8bit):
    """`nn.Conv2d` with an int8 weight; with "w8a8" a 1x1 one rounds the channels of every pixel to int8, with
    "w8a8_static" every activation under one scale and zero point; others keep their activations ("w8a16").

    >>> Conv2d8bit.from_conv2d(nn.Conv2d(8, 16, 3))(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 16, 3, 3])
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        """From a description: every field of `spec()` but the type; `from_conv2d` is the usual way."""
        super().__init__(fields["out_channels"], _columns(fields), fields["scheme"], static=static_of(fields))
        self._describe(fields)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, scheme: str = "w8a8", static: StaticInput | None = None) -> Self:
        """Quantize a convolution by rounding each output channel to its largest magnitude / 127.

        static: how the activations of a 1x1 convolution with "w8a8_static" are rounded.
        """
        rounding = {} if static is None else {"input_scale": static.scale, "input_zero": static.zero}
        layer = cls({**{name: getattr(conv, name) for name in FIELDS}, "scheme": scheme, **rounding})
        layer._quantize(conv.weight.detach().flatten(1))
        layer.bias = cast("nn.Parameter | None", conv.bias)
        layer.train(conv.training)
        layer.finalize()
        return layer


class Conv2d16bit(CompressedConv2d, Weight16bit):
    """`nn.Conv2d` with a weight stored in bfloat16 or float16, which computes from a dense one in the layer's dtype.

    >>> Conv2d16bit.from_conv2d(nn.Conv2d(8, 16, 3), scheme="bf16")(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 16, 3, 3])
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        """From a description: every field of `spec()` but the type; `from_conv2d` is the usual way."""
        super().__init__(fields["out_channels"], _columns(fields), fields["scheme"])
        self._describe(fields)

    @property
    def pointwise(self) -> bool:
        """No: torch's own convolution multiplies dense weights best, 1x1 ones too."""
        return False

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, scheme: str = "bf16") -> Self:
        """Round the weight to 16 bits; the bias is shared. Raises ValueError for values beyond float16."""
        layer = cls({**{name: getattr(conv, name) for name in FIELDS}, "scheme": scheme})
        layer._quantize(conv.weight.detach().flatten(1))
        layer.bias = cast("nn.Parameter | None", conv.bias)
        layer.train(conv.training)
        layer.finalize()
        return layer
