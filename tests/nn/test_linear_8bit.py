"""Linear8bit: close to its dense layer, canonical tensors in files, dense or sparse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pykd.nn import COMPRESSED, Linear8bit


def layer(zeros: float = 0.0, *, bias: bool = True) -> tuple[nn.Linear, Linear8bit]:
    linear = nn.Linear(67, 45, bias=bias)
    with torch.no_grad():
        linear.weight[torch.rand(45, 67) < zeros] = 0
    return linear, Linear8bit.from_linear(linear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_is_close_to_the_dense_layer(zeros: float, bias: bool) -> None:
    linear, compressed = layer(zeros, bias=bias)
    x = torch.randn(3, 5, 67)
    assert (compressed(x) - linear(x)).abs().max() < 0.03
    assert (compressed.to_dense()(x) - linear(x)).abs().max() < 0.02
    assert (compressed.weight[linear.weight == 0] == 0).all()
    assert compressed.to_linear().weight.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_spec_and_state_dict_rebuild_it(zeros: float, device: str) -> None:
    _, compressed = layer(zeros)
    state = compressed.state_dict()
    assert set(state) == {"scales", "bias"} | ({"bitmask", "qvalues"} if zeros else {"qweight"})
    if zeros:
        assert sum(t.nbytes for t in state.values()) < 45 * 67 * 0.65
    again = COMPRESSED["Linear8bit"].from_spec(compressed.spec(), device=device)
    again.load_state_dict(state, assign=True)
    x = torch.randn(4, 67)
    assert torch.equal(again(x), compressed(x)) and again.spec() == compressed.spec()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_copies_pickles_and_keeps_its_element_types() -> None:
    _, compressed = layer(0.6)
    x = torch.randn(2, 67)
    again = pickle.loads(pickle.dumps(copy.deepcopy(compressed)))
    assert torch.equal(again(x), compressed(x))
    again.to(torch.bfloat16)
    assert again(x.bfloat16()).dtype == again.weight.dtype == torch.bfloat16
    assert again.state_dict()["scales"].dtype == torch.float32
    moved = again.to("meta")
    assert set(dict(moved.named_buffers())) == {"bitmask", "qvalues", "scales"}


def test_gradient_and_repr() -> None:
    _, compressed = layer()
    x = torch.randn(3, 67, requires_grad=True)
    compressed(x).sum().backward()
    torch.testing.assert_close(x.grad, compressed.weight.sum(0).expand(3, 67), rtol=1e-4, atol=1e-4)
    assert torch.equal(compressed.bias.grad, torch.full((45,), 3.0))
    assert "in_features=67, out_features=45, bias=True" in repr(compressed)
    assert "kept=0.4" in repr(layer(0.6)[1]) or "kept=0.3" in repr(layer(0.6)[1])


def test_a_damaged_bitmask_is_an_error() -> None:
    _, compressed = layer(0.6)
    state = dict(compressed.state_dict())
    state["bitmask"] = state["bitmask"] ^ 1
    with pytest.raises(ValueError, match=r"bitmask keeps \d+ weights but qvalues holds \d+: the tensors are damaged"):
        Linear8bit.from_spec(compressed.spec()).load_state_dict(state)
