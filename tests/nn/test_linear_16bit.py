"""Layers in 16 bits: half the bytes, exactly the rounded weight, in every dtype and from every file."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.nn import COMPRESSED, CompressedModule, Conv2d16bit, Embedding16bit, Linear16bit, TiedLinear
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT, round_16bit

KINDS = ("linear", "conv", "pointwise", "embedding")


def make(kind: str, scheme: str, zeros: float = 0.0) -> tuple[nn.Module, CompressedModule, Tensor]:
    """A dense layer, its 16-bit form, and an input."""
    dense: Any = {
        "linear": nn.Linear(67, 45),
        "conv": nn.Conv2d(8, 12, 3, padding=1, groups=2, padding_mode="reflect"),
        "pointwise": nn.Conv2d(8, 12, 1),
        "embedding": nn.Embedding(50, 24, padding_idx=0),
    }[kind]
    with torch.no_grad():
        dense.weight[torch.rand_like(dense.weight) < zeros] = 0
    if kind == "linear":
        return dense, Linear16bit.from_linear(dense, scheme=scheme), torch.randn(3, 5, 67)
    if kind == "embedding":
        return dense, Embedding16bit.from_embedding(dense, scheme=scheme), torch.randint(0, 50, (4, 6))
    return dense, Conv2d16bit.from_conv2d(dense, scheme=scheme), torch.randn(2, 8, 9, 10)


@pytest.mark.parametrize("scheme", SCHEMES_16BIT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_computes_with_the_rounded_weight_and_rebuilds(kind: str, scheme: str, zeros: float) -> None:
    dense, layer, x = make(kind, scheme, zeros)
    weight: Any = dense.weight
    assert torch.equal(layer.weight, weight.detach().to(SCHEMES_16BIT[scheme]).float().view(layer.weight.shape))
    assert torch.equal(layer(x), layer.to_dense()(x))
    state = layer.state_dict()
    stored = sum(tensor.nbytes for name, tensor in state.items() if name != "bias")
    assert stored == 2 * weight.numel() if not zeros else stored < 1.2 * weight.numel()
    for device in ("cpu", "meta"):
        again = COMPRESSED[layer.spec()["type"]].from_spec(layer.spec(), device=device)
        again.load_state_dict(state, assign=True)
        assert torch.equal(again(x), layer(x)) and again.spec() == layer.spec()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(layer)))(x), layer(x))
    assert repr(layer).count(f"scheme={scheme}") == 1


@pytest.mark.parametrize("scheme", SCHEMES_16BIT)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_and_back_lose_nothing(kind: str, scheme: str) -> None:
    _, layer, x = make(kind, scheme, 0.7)
    before, want = {k: v for k, v in layer.state_dict().items() if k != "bias"}, layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        given = x.to(dtype) if x.is_floating_point() else x
        assert layer(given).dtype == layer.weight.dtype == dtype
        torch.testing.assert_close(layer(given).float(), want, rtol=0.05, atol=0.05)
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
    assert {"values", "bitmask"} <= set(dict(layer.to("meta").named_buffers()))


def test_the_bias_is_shared_and_inputs_have_gradients() -> None:
    dense, layer, x = make("linear", "bf16")
    assert layer.bias is dense.bias
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_tied_projection_multiplies_with_the_rows() -> None:
    _, table, _ = make("embedding", "bf16")
    head = TiedLinear.from_linear(nn.Linear(24, 50, bias=False), table)  # type: ignore[arg-type]
    x = torch.randn(3, 24)
    assert torch.equal(head(x), nn.functional.linear(x, table.weight))
    assert torch.equal(table(torch.tensor([7])), table.weight[7:8]) and set(table.state_dict()) == {"values"}


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="unknown 16-bit scheme 'bf61': did you mean 'bf16'"):
        Linear16bit(4, 4, "bf61")
    with pytest.raises(ValueError, match="a weight of magnitude 70000 is too large for scheme 'fp16': use 'bf16'"):
        round_16bit(torch.tensor([[-70000.0]]), "fp16")
    with pytest.raises(ValueError, match="weight holds NaN or infinite values: repair or retrain the layer"):
        round_16bit(torch.tensor([[torch.nan]]), "bf16")
    layer = Linear16bit.from_spec(make("linear", "bf16", 0.7)[1].spec())
    with pytest.raises(ValueError, match=r"bitmask keeps 0 weights but values holds \d+: the tensors are damaged"):
        layer.finalize()
