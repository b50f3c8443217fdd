"""A saved model comes back with the same logits, in this process and in a new one; damaged folders are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pykd
from pykd.models.adapter import logits

Models = Callable[[str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet18", "mobilenet_v2"])
def test_plain_round_trip(family: str, tmp_path: Path, model_of: Models, batch_of: Batches) -> None:
    model, batch = model_of(family), batch_of(family)
    model.pykd_report = [{"stage": "train", "accuracy": 0.5}]
    state = torch.get_rng_state()
    pykd.save_pretrained(model, tmp_path / "model", provenance={"teacher": "none"})
    assert torch.equal(state, torch.get_rng_state()), "saving must not touch the random state"
    loaded: Any = pykd.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.pykd_report == model.pykd_report
    assert torch.equal(logits(model, batch), logits(loaded, batch))
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
