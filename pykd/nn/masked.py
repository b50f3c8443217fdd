"""Trainable layers that compute with a part of their weights: sparsity that rises while a model is trained.

A layer keeps its dense weight as the parameter and computes with ``weight * mask``. Weights outside the mask get no
gradient and do not count; a mask that changes later may take some back. `convert` makes the sparse layer, whose
parameter holds the kept weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.conv_fields import FIELDS
from pykd.nn.fake_quantized import straight_through
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear


class Masked(nn.Module):
    """What `MaskedLinear` and `MaskedConv2d` share.

    Attributes:
        mask: bool like the weight, True where it counts; part of the state, so that an interrupted training continues.
        scores: None, or a parameter like the weight whose gradient is ``g * weight`` where g is the gradient of the
            masked weight: it falls where training moves a weight towards zero and rises where it moves it away
            (movement pruning, Sanh et al. 2020, section 4).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor
    scores: nn.Parameter | None

    def _prepare(self, source: Any, mask: Tensor | None, learn_scores: bool) -> Self:
        """Take over parameters and mode of a dense layer; they are shared, so that optimizers keep their hold."""
        self.weight, self.bias = source.weight, source.bias
        like = torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask.view(self.weight.shape)
        self.register_buffer("mask", like.clone())
        scores = nn.Parameter(torch.zeros_like(self.weight, requires_grad=False)) if learn_scores else None
        self.register_parameter("scores", scores)
        self.train(source.training)
        return self

    def masked(self) -> Tensor:
        """The weight that the layer computes with."""
        if self.scores is None:
            return self.weight * self.mask
        return self.weight * straight_through(self.scores, self.mask.to(self.weight.dtype))


class MaskedLinear(Masked, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a mask over its weights.

    >>> layer = MaskedLinear.from_linear(nn.Linear(4, 2), mask=torch.tensor([[True, False] * 2] * 2))
    >>> layer.convert().sparsity
    0.5
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, mask: Tensor | None = None, learn_scores: bool = False) -> Self:
        """A layer with the very parameters of `linear`, all of them counting unless a mask says otherwise."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return layer._prepare(linear, mask, learn_scores)

    def convert(self) -> SparseLinear:
        """The sparse layer of the weights that count."""
        return SparseLinear.from_linear(self, mask=self.mask)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.masked(), self.bias)


class MaskedConv2d(Masked, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a mask over its weights."""

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, *, mask: Tensor | None = None, learn_scores: bool = False) -> Self:
        """A layer with the very parameters of `conv`, all of them counting unless a mask says otherwise."""
        fields: dict[str, Any] = {name: getattr(conv, name) for name in FIELDS}
        layer = cls(**fields, bias=conv.bias is not None, device="meta")
        return layer._prepare(conv, mask, learn_scores)

    def convert(self) -> SparseConv2d:
        """The sparse layer of the weights that count."""
        return SparseConv2d.from_conv2d(self, mask=self.mask)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self._conv_forward(input, self.masked(), self.bias)
        return result
