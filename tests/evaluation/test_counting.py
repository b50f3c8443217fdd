"""Sizes: tied tensors once, compressed layers as the dense layer they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.evaluation.counting import count_parameters, saved_bytes, state_bytes
from pykd.nn.compressed import CompressedModule


class Signs(CompressedModule):
    """A real, if small, codec: each weight is -1, 0 or 1, stored as int8 in `qweight`, times one trainable scale."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__(torch.float32)
        self.register_buffer("qweight", codes.to(torch.int8))
        self.values = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

    def spec(self) -> dict[str, Any]:
        return {"type": "Signs", "shape": list(self.qweight.shape)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Signs:
        return cls(torch.zeros(spec["shape"], device=device))

    def dequantize(self) -> Tensor:
        return self.qweight.float() * self.values

    def to_dense(self) -> nn.Module:
        return nn.Linear(*self.qweight.shape)


def test_dense_zero_and_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = 0
    assert count_parameters(model) == (16 + 4 + 4, 12 + 4 + 4)


def test_a_compressed_layer_counts_what_it_stands_for() -> None:
    layer = Signs(torch.tensor([[1, 0, -1], [0, 0, 1]]))
    assert count_parameters(nn.Sequential(layer)) == (6 + 2, 3 + 1)


def test_a_layer_used_twice_counts_once() -> None:
    layer = Signs(torch.ones(2, 3))
    assert count_parameters(nn.Sequential(layer, layer)) == (8, 7)


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
