"""Convolutions whose pruned weights are gone from the file and, for 1x1 kernels, from the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.conv_fields import FIELDS, is_pointwise
from pykd.nn.sparse_linear import SparseWeight
from pykd.ops.bitmask import bitmask_expand
from pykd.ops.sparse_linear import sparse_linear


class SparseConv2d(SparseWeight):
    """`nn.Conv2d` that stores only the weights that were not pruned, as the matrix [out, in / groups * kh * kw].

    A 1x1 convolution without groups and padding is a linear layer over the channels of every pixel and runs the sparse
    kernels. Any other expands its weight when it changed (once after loading, at every step while `values` needs a
    gradient, at every call of a compiled graph) and is convolved densely: smaller on disk, no faster.

    >>> layer = SparseConv2d.from_conv2d(nn.Conv2d(4, 8, 3), mask=torch.rand(8, 4, 3, 3) < 0.5)
    >>> layer(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 4, 4])
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    def __init__(self, spec: dict[str, Any], *, device: torch.device | str | None = None) -> None:
        """An empty layer from every field of `spec()` but the type; `from_conv2d` is the usual way."""
        columns = spec["in_channels"] // spec["groups"] * spec["kernel_size"][0] * spec["kernel_size"][1]
        dtype = getattr(torch, spec["dtype"])
        format = spec.get("format", "bitmask")  # files of earlier versions know no other
        super().__init__(spec["out_channels"], columns, spec["nnz"], spec["bias"], dtype, device, format)
        for name in FIELDS:
            value = spec[name]
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self._dense: tuple[tuple[int, int, int], Tensor] | None = None  # what it was made from, and the weight

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, mask: Tensor | None = None, format: str = "auto") -> Self:
        """The layer without the weights that `mask` prunes (boolean, the weight's shape; default: weight != 0).

        format: as in `SparseLinear.from_linear`, of the matrix [out_channels, in_channels / groups * kh * kw].

        Raises:
            ValueError: the mask is not boolean or not of the weight's shape, or does not fit the format.
        """
        weight = conv.weight
        if mask is not None and mask.shape != weight.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        fields = {name: getattr(conv, name) for name in FIELDS}
        dtype = str(weight.dtype).removeprefix("torch.")
        layer = cls({**fields, "nnz": 0, "bias": False, "dtype": dtype}, device=weight.device)
        layer._take(weight, weight.flatten(1), None if mask is None else mask.flatten(1), conv.bias, format)
        return layer.train(conv.training)

    @property
    def pointwise(self) -> bool:
        """Whether this is a linear layer over channels, and runs the sparse kernels."""
        return is_pointwise(self)

    def spec(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in FIELDS}
        return {
            "type": "SparseConv2d",
            **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
            "nnz": self.values.numel(),
            "bias": self.bias is not None,
            "dtype": str(self.values.dtype).removeprefix("torch."),
            "format": self.format,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        return cls(spec, device=device)

    def forward(self, x: Tensor) -> Tensor:
        if self.pointwise:
            pixels = x[..., :: self.stride[0], :: self.stride[1]].movedim(-3, -1)
            return sparse_linear(pixels, self.packed, self.bias).movedim(-1, -3)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border(), mode=self.padding_mode), (0, 0)
        return F.conv2d(x, self._dense_weight(), self.bias, self.stride, padding, self.dilation, self.groups)

    def _dense_weight(self) -> Tensor:
        """The weight to convolve with: kept as long as nothing it was made from changes."""
        trains = torch.is_grad_enabled() and self.values.requires_grad
        if trains or torch.compiler.is_compiling() or self.values.is_inference():
            return self.dequantize()
        made_from = (self.values._version, self.values.data_ptr(), self.bitmask._version)
        if self._dense is None or self._dense[0] != made_from:
            self._dense = (made_from, self.dequantize().detach())
        return self._dense[1]

    def _border(self) -> list[int]:
        """What F.pad takes: the last dimension first, before and after."""
        sizes = zip(self.dilation, self.kernel_size, strict=True)
        totals = [d * (k - 1) if self.padding == "same" else 0 for d, k in sizes]
        if not isinstance(self.padding, str):
            return [side for size in reversed(self.padding) for side in (size, size)]
        return [side for size in reversed(totals) for side in (size // 2, size - size // 2)]

    def _pack(self) -> None:
        super()._pack()
        if not self.pointwise and not self.values.is_inference():
            with torch.no_grad():
                self._dense_weight()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}

    def dequantize(self) -> Tensor:
        return bitmask_expand(self.packed).view(self.out_channels, -1, *self.kernel_size)

    def to_dense(self) -> nn.Conv2d:
        return self.to_conv2d()

    def to_conv2d(self) -> nn.Conv2d:
        """The ordinary convolution with zeros where weights were pruned; shares the bias."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        dense = nn.Conv2d(**fields, bias=False, device="meta", dtype=self.values.dtype)
        dense.weight = nn.Parameter(self.dequantize().detach().clone(), requires_grad=self.values.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        shown = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
        fields = ", ".join(f"{name}={getattr(self, name)}" for name in shown)
        return f"{fields}, bias={self.bias is not None}, sparsity={self.sparsity:.3f}{self._shown_format()}"
