from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from pykd.nn import COMPRESSED, SparseConv2d

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "dilation": 2, "groups": 4},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "valid"},
]


def pruned(**options: Any) -> tuple[nn.Conv2d, SparseConv2d]:
    conv = nn.Conv2d(8, 12, **options)
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.3)
    return conv, SparseConv2d.from_conv2d(conv)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_computes_what_the_dense_layer_computes(options: dict[str, Any]) -> None:
    conv, layer = pruned(**options)
    for shape in ((2, 8, 9, 7), (8, 9, 7)):
        x = torch.randn(shape)
        want = conv(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.to_dense().weight, conv.weight)
    rebuilt = COMPRESSED["SparseConv2d"].from_spec(layer.spec())
    rebuilt.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for other in (rebuilt, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_training_is_followed(kernel_size: int) -> None:
    _, layer = pruned(kernel_size=kernel_size)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = layer(x)
    layer(x).square().mean().backward()
    with torch.no_grad():
        layer.values.sub_(layer.values.grad)
        after = layer(x)
        torch.testing.assert_close(after, layer.to_conv2d()(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_compiles_and_exports(kernel_size: int) -> None:
    _, layer = pruned(kernel_size=kernel_size)
    layer.requires_grad_(False)
    x = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_the_dense_weight_is_kept_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = pruned(kernel_size=3)
    made: list[None] = []
    dequantize = layer.dequantize
    monkeypatch.setattr(layer, "dequantize", lambda: made.append(None) or dequantize())
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        layer(x), layer(x)
        assert made == []
        layer.values.mul_(2)
        layer(x), layer(x)
        assert len(made) == 1


def test_inference_mode() -> None:
    with torch.inference_mode():
        conv, layer = pruned(kernel_size=3)
        x = torch.randn(1, 8, 5, 5)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), the weight \(12, 8, 3, 3\)"):
        SparseConv2d.from_conv2d(nn.Conv2d(8, 12, 3), mask=torch.ones(2, dtype=torch.bool))
    _, layer = pruned(kernel_size=3)
    damaged = layer.state_dict()
    damaged["bitmask"] = damaged["bitmask"] ^ 1
    with pytest.raises(ValueError, match="corrupt packed weight"):
        layer.load_state_dict(damaged)
