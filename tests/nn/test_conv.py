"""Compressed convolutions: every kind that nn.Conv2d knows, through the linear kernel where it is 1x1."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pykd.nn import COMPRESSED, Conv2d4bit, Conv2d8bit
from pykd.nn.codecs.four_bit import dequantize_4bit, quantize_4bit

KINDS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 1, "padding": "same"},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    {"kernel_size": 3, "padding": (0, 1), "groups": 4, "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "padding": "same", "dilation": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid", "padding_mode": "replicate"},
]


@pytest.mark.parametrize("cls", [Conv2d4bit, Conv2d8bit])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_computes_what_its_dense_layer_computes(cls: type[Conv2d4bit | Conv2d8bit], kind: dict[str, Any]) -> None:
    conv = nn.Conv2d(8, 12, **kind)
    compressed = cls.from_conv2d(conv)
    x = torch.randn(2, 8, 9, 10)
    dense = compressed.to_dense()
    y = compressed(x)
    assert y.shape == conv(x).shape and compressed.weight.shape == conv.weight.shape
    tolerance = 1e-5 if cls is Conv2d4bit or not compressed.pointwise else 0.05
    torch.testing.assert_close(y, dense(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dense(x), conv(x), rtol=0.5, atol=0.5)
    for tensors in (x.contiguous(memory_format=torch.channels_last), x[:1]):
        torch.testing.assert_close(compressed(tensors), dense(tensors), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls", [Conv2d4bit, Conv2d8bit])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[5]], ids=str)
def test_spec_and_state_dict_rebuild_it(cls: type[Conv2d4bit | Conv2d8bit], kind: dict[str, Any], zeros: float) -> None:
    conv = nn.Conv2d(16, 12, **kind)
    with torch.no_grad():
        conv.weight[torch.rand_like(conv.weight) < zeros] = 0
    compressed = cls.from_conv2d(conv)
    state = compressed.state_dict()
    assert set(state) - {"bias"} == {"scales"} | ({"bitmask", "qvalues"} if zeros else {"qweight"})
    x = torch.randn(1, 16, 7, 7)
    for device in ("cpu", "meta"):
        again = COMPRESSED[compressed.spec()["type"]].from_spec(compressed.spec(), device=device)
        again.load_state_dict(state, assign=True)
        assert torch.equal(again(x), compressed(x)) and again.spec() == compressed.spec()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert (compressed.weight[conv.weight == 0] == 0).all()


@pytest.mark.parametrize("cls", [Conv2d4bit, Conv2d8bit])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=str)
def test_types_devices_and_gradient(cls: type[Conv2d4bit | Conv2d8bit], kind: dict[str, Any]) -> None:
    compressed = cls.from_conv2d(nn.Conv2d(8, 12, **kind))
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    compressed(x).sum().backward()
    assert x.grad is not None and compressed.bias.grad is not None
    twin = copy.deepcopy(compressed).to(torch.bfloat16)
    assert twin(x.detach().bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.float().weight, compressed.weight)
    assert all(tensor.is_meta for tensor in copy.deepcopy(compressed).to("meta").buffers())


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[6]], ids=str)
def test_codes_chosen_elsewhere_are_taken_as_they_are(kind: dict[str, Any]) -> None:
    conv = nn.Conv2d(8, 12, **kind)
    tensors = quantize_4bit(conv.weight.detach().flatten(1) * 0.9, code="uint4", group_size=5)
    taken = Conv2d4bit.from_codes(conv, tensors, group_size=5, symmetric=False)
    columns = conv.weight[0].numel()
    want = dequantize_4bit(tensors, code="uint4", in_features=columns, group_size=5)
    assert torch.equal(taken.weight.flatten(1), want) and taken.bias is conv.bias
    with pytest.raises(ValueError, match="zeros must be None for 12 x"):
        Conv2d4bit.from_codes(conv, tensors, group_size=5)


def test_an_unfilled_layer_and_an_image_without_batch() -> None:
    conv = nn.Conv2d(8, 4, 3)
    compressed = Conv2d4bit.from_conv2d(conv)
    skeleton = Conv2d4bit.from_spec(compressed.spec())
    for name, tensor in compressed.state_dict().items():
        getattr(skeleton, name).data.copy_(tensor)
    x = torch.randn(8, 5, 5)
    assert torch.equal(skeleton(x), compressed(x))
    skeleton.finalize()
    assert torch.equal(skeleton(x), compressed(x))
    pointwise = Conv2d4bit.from_conv2d(nn.Conv2d(8, 4, 1), scheme="nf4", group_size=None)
    assert pointwise(x).shape == (4, 5, 5)
    assert "kernel_size=(1, 1)" in repr(pointwise) and "scheme=nf4" in repr(pointwise)


def test_w4a8_rounds_the_activations_of_pointwise_convolutions_only() -> None:
    x = torch.randn(2, 8, 6, 5)
    for kernel_size in (1, 3):
        conv = nn.Conv2d(8, 12, kernel_size)
        rounds, keeps = (Conv2d4bit.from_conv2d(conv, scheme=scheme) for scheme in ("w4a8", "w4a16"))
        assert torch.equal(rounds.weight, keeps.weight)
        assert torch.equal(rounds(x), keeps(x)) == (kernel_size == 3)
        torch.testing.assert_close(rounds(x), keeps(x), rtol=0.03, atol=0.03)
        again = COMPRESSED["Conv2d4bit"].from_spec(rounds.spec())
        again.load_state_dict(rounds.state_dict())
        assert torch.equal(again(x), rounds(x))
