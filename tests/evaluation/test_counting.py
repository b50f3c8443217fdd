"""Sizes: tied tensors once, compressed layers as the dense layer they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pykd.errors import ArtifactError
from pykd.evaluation.counting import count_parameters, saved_bytes, state_bytes
from pykd.io.save import save_pretrained
from pykd.models.torchvision import load_torchvision
from pykd.nn import Conv2d4bit, Linear4bit, Linear8bit, SparseConv2d, SparseLinear


def half_zero(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer with every second weight zero and the others far enough from zero to keep a code of their own."""
    with torch.no_grad():
        kept = (torch.arange(layer.weight.numel()) % 2 == 0).reshape(layer.weight.shape)
        layer.weight.copy_(kept * (1 + torch.rand_like(layer.weight)))
        layer.bias.fill_(1)
    return layer


def linear() -> nn.Linear:
    layer = half_zero(nn.Linear(37, 6))
    assert isinstance(layer, nn.Linear)
    return layer


def conv() -> nn.Conv2d:
    layer = half_zero(nn.Conv2d(4, 6, 3))
    assert isinstance(layer, nn.Conv2d)
    return layer


COMPRESSED = {
    "w4a16": lambda: Linear4bit.from_linear(linear()),
    "w4a16, asymmetric": lambda: Linear4bit.from_linear(linear(), symmetric=False),
    "nf4": lambda: Linear4bit.from_linear(linear(), scheme="nf4"),
    "w8a8": lambda: Linear8bit.from_linear(linear()),
    "sparse": lambda: SparseLinear.from_linear(linear()),
    "w4a16 conv": lambda: Conv2d4bit.from_conv2d(conv()),
    "sparse conv": lambda: SparseConv2d.from_conv2d(conv()),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_compressed_layer_counts_as_the_dense_one(kind: str) -> None:
    dense = conv() if "conv" in kind else linear()
    total, nonzero = count_parameters(dense)
    assert nonzero < 0.6 * total
    assert count_parameters(nn.Sequential(COMPRESSED[kind]())) == (total, nonzero)


def test_a_layer_used_twice_counts_once() -> None:
    layer = SparseLinear.from_linear(linear())
    assert count_parameters(nn.Sequential(layer, layer)) == count_parameters(layer)


def test_the_state_is_as_big_as_the_saved_model(tmp_path: Path) -> None:
    model = load_torchvision("squeezenet1_1", num_classes=3)
    save_pretrained(model, tmp_path / "model")
    assert state_bytes(model) == saved_bytes(tmp_path / "model")


def test_dense_zero_and_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = 0
    assert count_parameters(model) == (16 + 4 + 4, 12 + 4 + 4)


def test_the_bytes_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    model = nn.Linear(7, 5)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert saved_bytes(tmp_path) == saved_bytes(tmp_path / "model.safetensors") == size
    assert state_bytes(model) == size


def test_tied_tensors_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    apart = state_bytes(model)
    model[1].weight = model[0].weight
    assert apart - state_bytes(model) > 64 * 64 * 4 - 200


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no saved model \(no \.safetensors file\)"):
        saved_bytes(tmp_path)
