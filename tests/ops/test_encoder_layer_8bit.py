"""A whole encoder layer in one call has the bits of its ops one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pykd.nn.codecs.eight_bit import quantize_8bit
from pykd.ops.add_norm import add_norm
from pykd.ops.attention import attention
from pykd.ops.dispatch import native
from pykd.ops.encoder_layer_8bit import Norm, Packed, encoder_layer_8bit
from pykd.ops.int8_r16 import pack_r16
from pykd.ops.linear_8bit import linear_8bit

pytestmark = pytest.mark.skipif(native is None, reason="the op is the native kernel's")


def packed(out: int, columns: int, bias: torch.dtype | None = torch.float32, static: float = 0.0) -> Packed:
    weight = pack_r16(*quantize_8bit(torch.randn(out, columns) / columns**0.5))
    shift = None if bias is None else torch.randn(out).to(bias)
    return Packed(weight, shift, columns, out, None, static, 5 if static else 0)


def layer(hidden: int, width: int, neurons: int, activation: str = "gelu", static: float = 0.0) -> tuple[Packed, ...]:
    attends = [packed(width, hidden, bias, static) for bias in (torch.float32, torch.bfloat16, None)]
    halves = packed(neurons, hidden)._replace(activation=activation), packed(hidden, neurons)
    return (*attends, packed(hidden, width), *halves)


def norm(hidden: int) -> Norm:
    return Norm(torch.randn(hidden), torch.randn(hidden), 1e-12)


def one_by_one(
    x: Tensor, linears: tuple[Packed, ...], norms: tuple[Norm, Norm], heads: int, scale: float, bias: Tensor | None
) -> Tensor:
    def linear(at: int, x: Tensor) -> Tensor:
        of = linears[at]
        static = {"input_scale": of.input_scale, "input_zero": of.input_zero} if of.input_scale else {}
        options = {"out_features": of.out_features, "activation": of.activation, **static}
        return linear_8bit(x, of.weight, bias=of.bias, **options)  # type: ignore[arg-type]

    looked = attention(linear(0, x), linear(1, x), linear(2, x), heads=heads, scale=scale, bias=bias)
    z = add_norm(linear(3, looked), x, *norms[0])
    return add_norm(linear(5, linear(4, z)), z, *norms[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads", "dim", "neurons"),
    [(1, 1, 4, 1, 1, 1), (2, 7, 24, 3, 8, 40), (1, 50, 33, 2, 5, 300), (3, 140, 16, 1, 16, 8)],
)
def test_the_bits_of_its_ops(
    isa: str, threads: int, batch: int, length: int, hidden: int, heads: int, dim: int, neurons: int
) -> None:
    x, bias = torch.randn(batch, length, hidden), torch.zeros(batch, length)
    bias[:, length // 2 + 1 :] = -torch.inf
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for static in (0.0, 0.03):
                linears, norms = layer(hidden, heads * dim, neurons, static=static), (norm(hidden), norm(hidden))
                for shift in (None, bias):
                    want = one_by_one(x, linears, norms, heads, 0.4, shift)
                    got = encoder_layer_8bit(x, linears, norms, heads=heads, scale=0.4, bias=shift)
                    assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_static_scales_that_differ_are_each_rounded_by() -> None:
    """The codes of a query are used again for keys only where they are the same."""
    first, *rest = layer(12, 12, 20, static=0.02)
    linears = (first._replace(input_scale=0.05), *rest)
    norms, x = (norm(12), norm(12)), torch.randn(1, 9, 12)
    with torch.inference_mode():
        want = one_by_one(x, linears, norms, 2, 0.4, None)
        assert torch.equal(encoder_layer_8bit(x, linears, norms, heads=2, scale=0.4), want)
