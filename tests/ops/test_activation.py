"""Activations fused into linear_4bit and linear_8bit: torch's functions, to a few units of the last place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.nn.codecs.eight_bit import quantize_8bit
from pykd.nn.codecs.four_bit import quantize_4bit
from pykd.ops import int4_r16, int8_r16
from pykd.ops.activation import ACTIVATIONS, activate
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_8bit import linear_8bit

NAMES = [name for name in ACTIVATIONS if name]
Call = Callable[..., Tensor]


def four_bit(weight: Tensor, inputs: str = "keep", packed: bool = True) -> Call:
    tensors = quantize_4bit(weight, group_size=16)
    options: dict[str, Any] = {"group_size": 16, "inputs": inputs}
    if not packed:
        return lambda x, **more: linear_4bit(x, tensors.qweight, tensors.scales, **options, **more)
    layout = int4_r16.pack_r16(*tensors, in_features=weight.shape[1], group_size=16)
    return lambda x, **more: linear_4bit(x, layout, out_features=len(weight), **options, **more)


def eight_bit(weight: Tensor, scheme: str, packed: bool = True) -> Call:
    tensors = quantize_8bit(weight)
    if not packed:
        return lambda x, **more: linear_8bit(x, *tensors, scheme=scheme, **more)
    layout = int8_r16.pack_r16(*tensors)
    return lambda x, **more: linear_8bit(x, layout, out_features=len(weight), scheme=scheme, **more)


LAYERS: dict[str, Callable[..., Call]] = {
    "w4a16": four_bit,
    "w4a8": lambda weight, packed=True: four_bit(weight, "int8", packed),
    "w8a16": lambda weight, packed=True: eight_bit(weight, "w8a16", packed),
    "w8a8": lambda weight, packed=True: eight_bit(weight, "w8a8", packed),
}


def exact(x: Tensor, activation: str) -> Tensor:
    """In float64, without the cancellation of 1 + erf and 1 + tanh in the lower tail."""
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x * 0.5**0.5)
    if activation == "gelu_tanh":
        return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))
    return activate(x, activation)


@pytest.mark.parametrize("activation", NAMES)
def test_units_of_the_last_place(isa: str, activation: str) -> None:
    """An identity weight gives the function itself. The exponential in gelu_tanh magnifies the rounding of its
    argument, which is -17 at x = -5."""
    identity = int8_r16.pack_r16(torch.eye(32, dtype=torch.int8), torch.ones(32))
    most = {"gelu": 8, "gelu_tanh": 40, "silu": 4, "relu": 0}[activation]
    x = torch.rand(3000, 32) * 27 - (5 if activation == "gelu_tanh" else 13.5)
    got = linear_8bit(x, identity, scheme="w8a16", out_features=32, activation=activation)
    want = exact(x.double(), activation)
    unit = torch.ldexp(torch.ones(()).double(), (torch.frexp(want.abs().clamp_min(1e-37))[1] - 24).double())
    worst = ((got.double() - want).abs() / unit).max()
    assert worst <= most, worst
    one = int8_r16.pack_r16(torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
    special = torch.tensor([[torch.inf], [-torch.inf], [torch.nan], [0.0], [1e30], [-1e30], [-60.0]])
    got = linear_8bit(special, one, scheme="w8a16", out_features=1, activation=activation)
    torch.testing.assert_close(got.double(), activate(special.double(), activation), equal_nan=True)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_is_the_function_of_the_result(isa: str, layer: str, activation: str) -> None:
    call, bias = LAYERS[layer](torch.randn(45, 67)), torch.randn(45)
    for rows, dtype in ((1, torch.float32), (3, torch.bfloat16), (40, torch.float16), (0, torch.float32)):
        x = torch.randn(rows, 67).to(dtype)
        plain = call(x.float(), bias=bias)
        y = call(x, bias=bias, activation=activation)
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), activate(plain, activation), rtol=max(2e-6, eps), atol=1e-6)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_canonical_layout_runs_torchs_function(layer: str, activation: str) -> None:
    weight, x, bias = torch.randn(20, 33), torch.randn(2, 3, 33), torch.randn(20)
    canonical = LAYERS[layer](weight, packed=False)
    assert torch.equal(canonical(x, bias=bias, activation=activation), activate(canonical(x, bias=bias), activation))
    y = LAYERS[layer](weight)(x, bias=bias, activation=activation)
    torch.testing.assert_close(canonical(x, bias=bias, activation=activation), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_is_that_of_the_function_applied_afterwards(layer: str, activation: str) -> None:
    call = LAYERS[layer](torch.randn(12, 40))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 2, 40).to(dtype).requires_grad_()
        bias = torch.randn(12, requires_grad=True)
        y = call(x, bias=bias, activation=activation)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, bias), grad)
        wide = x.detach().float().requires_grad_()
        want = torch.autograd.grad(activate(call(wide, bias=bias), activation), (wide, bias), grad.float())
        assert got[0].dtype == dtype
        torch.testing.assert_close(got[0].float(), want[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["w4a8", "w8a8"])
def test_opcheck_compile_and_export(layer: str) -> None:
    weight, x = torch.randn(12, 40), torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    if layer == "w4a8":
        packed = int4_r16.pack_r16(*quantize_4bit(weight, group_size=16), in_features=40, group_size=16)
        args: tuple[Any, ...] = (x, packed, None, None, bias, "int4", 12, 16, "int8", "gelu")
        torch.library.opcheck(torch.ops.pykd.linear_4bit.default, args)
    else:
        args = (x, int8_r16.pack_r16(*quantize_8bit(weight)), None, bias, "w8a8", 12, "silu")
        torch.library.opcheck(torch.ops.pykd.linear_8bit.default, args)
    call = LAYERS[layer](weight)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x, activation="gelu_tanh") * 2

    want, compiled = Layer()(x), torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(want.sum(), x))
    torch.testing.assert_close(torch.export.export(Layer(), (x.detach(),)).module()(x.detach()), want)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", NAMES)
def test_on_a_gpu(activation: str) -> None:
    tensors, x = quantize_4bit(torch.randn(33, 96), group_size=32), torch.randn(20, 96)
    y = linear_4bit(x.cuda(), tensors.qweight.cuda(), tensors.scales.cuda(), activation=activation).cpu()
    torch.testing.assert_close(
        y, linear_4bit(x, tensors.qweight, tensors.scales, activation=activation), rtol=1e-5, atol=1e-4
    )


def test_torch_has_the_same_functions() -> None:
    x = torch.randn(100)
    assert torch.equal(activate(x, None), x) and torch.equal(activate(x, "gelu"), F.gelu(x))
    assert torch.equal(activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh"))
    assert torch.equal(activate(x, "silu"), F.silu(x)) and torch.equal(activate(x, "relu"), F.relu(x))


def test_errors() -> None:
    for call in (four_bit(torch.randn(4, 8)), eight_bit(torch.randn(4, 8), "w8a8")):
        with pytest.raises(ValueError, match="unknown activation 'gelu_than': did you mean 'gelu_tanh'"):
            call(torch.zeros(1, 8), activation="gelu_than")
