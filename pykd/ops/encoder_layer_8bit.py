"""A whole encoder layer of w8a8 linear layers in one native call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pykd.ops.activation import ACTIVATIONS
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, native, num_threads

TABLE.append(Route("encoder_layer_8bit", "cpu", "float32, six packed w8a8 layers, no gradient", "native kernel"))


class Packed(NamedTuple):
    """A w8a8 linear layer in the layout `int8_r16`: what `pykd.linear_8bit` is given."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    activation: str | None = None
    input_scale: float = 0.0
    input_zero: int = 0


class Norm(NamedTuple):
    """Scale and shift of a layer normalisation [hidden], float32, and what is added to its variance."""

    weight: Tensor
    bias: Tensor
    eps: float


def encoder_layer_8bit(
    x: Tensor,
    linears: tuple[Packed, ...],
    norms: tuple[Norm, Norm],
    *,
    heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """z = norm(x + mix(attention(query(x), key(x), value(x)))), y = norm(z + down(activation(up(z)))) (BERT's layer).

    What the ops `linear_8bit`, `attention` and `add_norm` compute one after the other, to the bit, without the calls
    between them.

    Args:
        x: [batch, length, hidden], float32, contiguous, on the CPU.
        linears: query, key, value, mix, up, down, which fit each other.
        norms: behind the attention and behind the feed-forward half.
        heads, scale, bias: as in `pykd.ops.attention.attention`.

    Returns [batch, length, hidden]. Not differentiable.
    """
    batch, length, hidden = x.shape
    width, neurons, threads = linears[0].out_features, linears[4].out_features, num_threads()
    sizes = batch, length, hidden, heads, width // heads, neurons
    y = torch.empty_like(x)
    scratch = torch.empty(native.encoder_layer_8bit_scratch(*sizes, threads))
    native.encoder_layer_8bit(
        x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(),
        [_numbers(layer) for layer in linears], [layer.input_scale for layer in linears],
        [address for norm in norms for address in (norm.weight.data_ptr(), norm.bias.data_ptr())],
        [norm.eps for norm in norms], *sizes, scale, threads,
    )  # fmt: skip
    return y


def _numbers(layer: Packed) -> tuple[int, ...]:
    bias, dtype = (0, 0) if layer.bias is None else (layer.bias.data_ptr(), DTYPE_CODES[layer.bias.dtype])
    sizes = layer.in_features, layer.out_features
    return layer.weight.data_ptr(), bias, *sizes, dtype, ACTIVATIONS[layer.activation], layer.input_zero
