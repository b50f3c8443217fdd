"""Trainable layers that compute with the weight they will have once packed: quantization-aware training.

A layer keeps its dense weight as the parameter. Forward passes round it by the functions that choose the codes of the
packed layer, so that the two compute with the same numbers bit for bit; gradients pass the rounding as if it were not
there (straight-through estimator: Bengio, Léonard and Courville 2013; Jacob et al. 2018, section 3).
"""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.codecs.eight_bit import dequantize_8bit, quantize_8bit
from pykd.nn.codecs.four_bit import FourBit, from_levels, nearest_levels, quantize_4bit
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT, round_16bit
from pykd.nn.compressed import CompressedModule
from pykd.nn.conv import Conv2d4bit, Conv2d8bit, Conv2d16bit
from pykd.nn.conv_fields import FIELDS, is_pointwise
from pykd.nn.linear_4bit import ROUNDING_4BIT, Linear4bit, code_of
from pykd.nn.linear_8bit import Linear8bit
from pykd.nn.linear_16bit import Linear16bit
from pykd.ops.int4_r16 import groups_of, unpack_nibbles
from pykd.ops.linear_4bit_reference import quantize_groups
from pykd.ops.linear_8bit import SCHEMES_8BIT


class StraightThrough(torch.autograd.Function):
    """Returns `rounded` bit for bit; the gradient goes to `exact` unchanged."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `exact`.

    >>> x = torch.tensor([0.4], requires_grad=True)
    >>> straight_through(x, x.detach().round()).backward(); x.grad
    tensor([1.])
    """
    result: Tensor = StraightThrough.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return result


def rounded_inputs(x: Tensor, group_size: int | None = None) -> Tensor:
    """Activations [..., features] as w8a8 rounds them, to int8 with a scale per row; or as w4a8, with one per group.

    >>> rounded_inputs(torch.tensor([[127.0, 0.4, -3.0]]))
    tensor([[127.,   0.,  -3.]])
    """
    size = groups_of(x.shape[-1], x.shape[-1] if group_size is None else group_size).size
    codes, scales = quantize_groups(x.detach().reshape(-1, x.shape[-1]), size)
    rounded = codes.float() * scales.repeat_interleave(size, dim=1)[:, : x.shape[-1]]
    return straight_through(x, rounded.to(x.dtype).view(x.shape))


class FakeQuantized(nn.Module, abc.ABC):
    """What `QATLinear` and `QATConv2d` share: the weight as a matrix [rows, columns], rounded in every forward pass.

    4-bit schemes keep the scales (and zero points) of the last search and search again, as `quantize_4bit` does, every
    `search_every` forward passes in training mode; between searches codes follow the weight, and `convert` packs under
    the scales in force. 8-bit schemes take a scale per row from the weight in every pass.

    Attributes:
        kept: bool like the weight, for a layer that was stored sparse or is pruned meanwhile: the weights that training
            may change; the others stay exactly zero. Else None.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    kept: Tensor | None

    def _prepare(
        self, source: Any, scheme: str, group_size: int | None, symmetric: bool, search_every: int, kept: Tensor | None
    ) -> Self:
        """Take over parameters and mode of a dense layer; they are shared, so that optimizers keep their hold."""
        self.weight = source.weight
        self.bias = source.bias
        self.scheme, self.symmetric = scheme, symmetric
        self.group_size = self.weight[0].numel() if group_size is None else group_size
        self.search_every, self.passes = search_every, 0
        self.code = None if scheme in SCHEMES_8BIT or scheme in SCHEMES_16BIT else code_of(scheme, symmetric=symmetric)
        self.register_buffer("kept", kept)
        self.register_buffer("zeros", None)
        if self.code is not None:
            groups = groups_of(self.weight[0].numel(), self.group_size).number
            shape = (len(self.weight), groups)
            self.register_buffer("scales", torch.zeros(shape, dtype=torch.float16, device=self.weight.device))
            if not symmetric:
                self.register_buffer("zeros", torch.zeros(shape, dtype=torch.uint8, device=self.weight.device))
            self.search()
        self.train(source.training)
        return self

    @torch.no_grad()
    def search(self) -> None:
        """Choose scales and zero points for the weight as it is now, as `quantize_4bit` does."""
        assert self.code is not None
        found = quantize_4bit(self._matrix(), code=self.code, group_size=self.group_size)
        self.scales.copy_(found.scales)
        if self.zeros is not None and found.zeros is not None:
            self.zeros.copy_(unpack_nibbles(found.zeros, self.scales.shape[1]))

    @torch.no_grad()
    def tensors(self) -> FourBit:
        """The canonical tensors of the weight as it is now, under the scales in force (4-bit schemes)."""
        assert self.code is not None
        zeros = None if self.zeros is None else self.zeros.float()
        return from_levels(self._levels(), self.scales.float(), zeros, code=self.code, group_size=self.group_size)

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The weight that the packed layer dequantizes to, bit for bit, in the weight's shape and dtype."""
        if self.scheme in SCHEMES_16BIT:
            dense = round_16bit(self._matrix(), self.scheme)
        elif self.code is None:
            dense = dequantize_8bit(quantize_8bit(self._matrix()))
        else:
            dense = self._levels() * self._spread(self.scales)
        return dense.to(self.weight.dtype).view(self.weight.shape)

    @abc.abstractmethod
    def convert(self) -> CompressedModule:
        """The packed layer."""

    @property
    def mask(self) -> Tensor:
        """bool like the weight: what training may change."""
        return torch.ones_like(self.weight, dtype=torch.bool) if self.kept is None else self.kept

    @property
    def rounds_inputs(self) -> bool:
        """Whether the packed layer rounds its activations."""
        return SCHEMES_8BIT.get(self.scheme, self.scheme in ROUNDING_4BIT)

    def _rounds(self, x: Tensor) -> Tensor:
        return rounded_inputs(x, None if self.code is None else self.group_size)

    def _matrix(self) -> Tensor:
        exact = self.weight.detach() if self.kept is None else self.weight.detach() * self.kept
        return exact.flatten(1)

    def _pruned(self) -> Self:
        """This layer, its pruned weights set to zero in the parameter too."""
        if self.kept is not None:
            with torch.no_grad():
                self.weight.mul_(self.kept)
        return self

    def _levels(self) -> Tensor:
        assert self.code is not None
        zero = None if self.zeros is None else self._spread(self.zeros)
        return nearest_levels(self._matrix().float(), self._spread(self.scales), zero, code=self.code)

    def _spread(self, per_group: Tensor) -> Tensor:
        columns = self.weight[0].numel()
        size = groups_of(columns, self.group_size).size
        return per_group.float().repeat_interleave(size, dim=1)[:, :columns]

    def _trained(self) -> Tensor:
        """The rounded weight for a forward pass, with the gradient of the parameter."""
        if self.training and self.code is not None:
            if self.passes == self.search_every:
                self.search()
                self.passes = 0
            self.passes += 1
        exact = self.weight if self.kept is None else self.weight * self.kept
        return straight_through(exact, self.rounded())

    def get_extra_state(self) -> Tensor:
        """Passes since the last search: with that an interrupted training continues bit for bit."""
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Tensor) -> None:
        self.passes = int(state)

    def extra_repr(self) -> str:
        groups = "" if self.code is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, scheme={self.scheme}{groups}{'' if self.symmetric else ', asymmetric'}"


class QATLinear(FakeQuantized, nn.Linear):
    """`nn.Linear` under quantization-aware training: computes what its `Linear4bit` or `Linear8bit` will.

    >>> layer = QATLinear.from_linear(nn.Linear(64, 16), scheme="nf4", group_size=32)
    >>> torch.equal(layer.rounded(), layer.convert().dequantize())
    True
    """

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scheme: str = "w4a16",
        group_size: int | None = 64,
        symmetric: bool = True,
        search_every: int = 50,
        kept: Tensor | None = None,
    ) -> Self:
        """A trainable layer with the very parameters of `linear`. Options as in `pykd.prepare_qat`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return layer._prepare(linear, scheme, group_size, symmetric, search_every, kept)

    def convert(self) -> Linear4bit | Linear8bit | Linear16bit:
        """The packed layer: the same codes, the same bias."""
        if self.scheme in SCHEMES_16BIT:
            return Linear16bit.from_linear(self._pruned(), scheme=self.scheme)
        if self.code is None:
            return Linear8bit.from_linear(self._pruned(), scheme=self.scheme)
        options: dict[str, Any] = {"group_size": self.group_size, "symmetric": self.symmetric}
        return Linear4bit.from_codes(self, self.tensors(), scheme=self.scheme, **options)

    def forward(self, input: Tensor) -> Tensor:
        x = self._rounds(input) if self.rounds_inputs else input
        return F.linear(x, self._trained(), self.bias)


class QATConv2d(FakeQuantized, nn.Conv2d):
    """`nn.Conv2d` under quantization-aware training: computes what its `Conv2d4bit` or `Conv2d8bit` will.

    With w8a8 and w4a8 the activations of 1x1 convolutions are rounded and those of others are not, as when packed.
    """

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        scheme: str = "w4a16",
        group_size: int | None = 64,
        symmetric: bool = True,
        search_every: int = 50,
        kept: Tensor | None = None,
    ) -> Self:
        """A trainable layer with the very parameters of `conv`. Options as in `pykd.prepare_qat`."""
        fields: dict[str, Any] = {name: getattr(conv, name) for name in FIELDS}
        layer = cls(**fields, bias=conv.bias is not None, device="meta")
        return layer._prepare(conv, scheme, group_size, symmetric, search_every, kept)

    def convert(self) -> Conv2d4bit | Conv2d8bit | Conv2d16bit:
        """The packed layer: the same codes, the same bias."""
        if self.scheme in SCHEMES_16BIT:
            return Conv2d16bit.from_conv2d(self._pruned(), scheme=self.scheme)
        if self.code is None:
            return Conv2d8bit.from_conv2d(self._pruned(), scheme=self.scheme)
        options: dict[str, Any] = {"group_size": self.group_size, "symmetric": self.symmetric}
        return Conv2d4bit.from_codes(self, self.tensors(), scheme=self.scheme, **options)

    def forward(self, input: Tensor) -> Tensor:
        rounds = self.rounds_inputs and is_pointwise(self)
        x = self._rounds(input.movedim(-3, -1)).movedim(-1, -3) if rounds else input
        result: Tensor = self._conv_forward(x, self._trained(), self.bias)
        return result
