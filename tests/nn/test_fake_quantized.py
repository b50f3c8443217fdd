"""QATLinear, QATConv2d: the weights of the packed layer bit for bit, gradients as if nothing were rounded."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pykd.nn import Conv2d4bit, Conv2d8bit, Linear4bit, Linear8bit, QATConv2d, QATLinear, codebook_code
from pykd.nn.fake_quantized import rounded_inputs, straight_through

FORMS: list[dict[str, Any]] = [
    {"scheme": "w4a16"},
    {"scheme": "w4a16", "symmetric": False},
    {"scheme": "w4a8"},
    {"scheme": codebook_code([-1.5, -0.9, -0.6, -0.4, -0.3, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8])},
    {"scheme": "nf4"},
    {"scheme": "fp4"},
    {"scheme": "w8a16"},
    {"scheme": "w8a8"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    group_size=st.integers(1, 80),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_rounded_weight_is_that_of_the_packed_layer(
    form: dict[str, Any], rows: int, columns: int, group_size: int, half: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, dtype=torch.bfloat16 if half else torch.float32)
    layer = QATLinear.from_linear(linear, group_size=group_size, **form)
    with torch.no_grad():
        linear.weight.mul_(1 + 0.3 * torch.randn(rows, columns)).mul_(torch.rand(rows, columns) < 0.9)
    packed = layer.convert()
    assert type(packed) is (Linear8bit if form["scheme"].startswith("w8") else Linear4bit)
    assert torch.equal(layer.rounded(), packed.dequantize()) and layer.rounded().dtype == linear.weight.dtype
    assert bool((layer.rounded()[linear.weight == 0] == 0).all())
    if not half:
        x = torch.randn(3, columns)
        torch.testing.assert_close(layer.eval()(x), packed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(form: dict[str, Any], kernel: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 18, kernel, stride=2, padding=kernel // 2, groups=3 if kernel == 3 else 1)
    layer = QATConv2d.from_conv2d(conv, group_size=10, **form)
    with torch.no_grad():
        conv.weight.mul_(1 + 0.3 * torch.randn_like(conv.weight))
    packed, x = layer.convert(), torch.randn(2, 12, 7, 7)
    assert type(packed) is (Conv2d8bit if form["scheme"].startswith("w8") else Conv2d4bit)
    assert torch.equal(layer.rounded(), packed.dequantize())
    torch.testing.assert_close(layer(x), packed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_pass_the_rounding(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(20, 6)
    layer = QATLinear.from_linear(linear, group_size=8, **form)
    x = torch.randn(5, 20, requires_grad=True)
    layer(x).square().sum().backward()
    seen = x.detach()
    if form["scheme"] in ("w8a8", "w4a8"):
        seen = rounded_inputs(seen, 8 if form["scheme"] == "w4a8" else None)
    weight = layer.rounded().requires_grad_()
    seen.requires_grad_()
    F.linear(seen, weight, linear.bias).square().sum().backward()
    assert layer.weight is linear.weight
    torch.testing.assert_close(linear.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, seen.grad)


def test_scales_are_searched_every_so_many_training_passes() -> None:
    torch.manual_seed(0)
    layer = QATLinear.from_linear(nn.Linear(16, 4), group_size=8, search_every=3).train()
    before, x = layer.scales.clone(), torch.randn(2, 16)
    with torch.no_grad():
        layer.weight.mul_(2)
    for _ in range(3):
        layer(x)
    assert torch.equal(layer.scales, before)
    layer.eval()(x)
    assert torch.equal(layer.scales, before)
    state = pickle.loads(pickle.dumps(copy.deepcopy(layer))).state_dict()
    layer.train()(x)
    assert torch.equal(layer.scales, 2 * before)
    again = QATLinear.from_linear(nn.Linear(16, 4), group_size=8, search_every=3).train()
    again.load_state_dict(state)  # as a checkpoint of before: the next pass searches
    again(x)
    assert torch.equal(again.scales, 2 * before) and again.passes == layer.passes == 1


def test_pruned_weights_stay_zero_through_training() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    kept = torch.rand(8, 32) < 0.4
    with torch.no_grad():
        linear.weight.mul_(kept)
    for form in FORMS:
        layer = QATLinear.from_linear(copy.deepcopy(linear), group_size=8, kept=kept, **form)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            layer(torch.randn(4, 32)).square().sum().backward()
            optimizer.step()
        assert bool((layer.weight[~kept] == 0).all()) and bool((layer.rounded()[~kept] == 0).all())
        with torch.no_grad():
            layer.weight.add_(1.0)  # whatever happens to the parameter, the layer computes without them
        packed = layer.convert()
        assert torch.equal(packed.dequantize(), layer.rounded()) and bool((packed.weight[~kept] == 0).all())


def test_straight_through_and_rounded_inputs() -> None:
    x = torch.tensor([[0.3, -127.0, 0.6]], requires_grad=True)
    got = rounded_inputs(x)
    assert got.tolist() == [[0.0, -127.0, 1.0]]
    (got * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]]
    assert torch.equal(straight_through(x, x.detach() + 1), x + 1)
    x = torch.tensor([[127.0, 0.4, 1.27, 0.4]])
    torch.testing.assert_close(rounded_inputs(x, 2), torch.tensor([[127.0, 0.0, 1.27, 0.4]]))


def test_repr() -> None:
    layer = QATLinear.from_linear(nn.Linear(8, 2), symmetric=False)
    assert repr(layer).endswith("out_features=2, bias=True, scheme=w4a16, group_size=64, asymmetric)")
    assert repr(QATConv2d.from_conv2d(nn.Conv2d(1, 2, 3), scheme="w8a8")).endswith("stride=(1, 1), scheme=w8a8)")
