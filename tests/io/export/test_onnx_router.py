"""The router in ONNX: ONNX Runtime sends the same rows deep, and answers them alike, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pykd import export, quantize
from pykd.io.export.onnx_model import OnnxModel
from pykd.models.adapter import call, logits
from pykd.models.router import calibrate

from ... import routers


@pytest.mark.parametrize("rounded", [{}, {"scheme": "w8a8"}, {"scheme": "w4a8", "group_size": 16}])
def test_onnx_runtime_routes_and_answers_alike(tmp_path: Path, rounded: dict[str, Any]) -> None:
    model: Any = routers.router().eval()
    if rounded:
        quantize(model, **rounded)
    calibrate(model, [routers.batch(64)], deep_share=0.4)
    record = export(model, tmp_path / "onnx", data=routers.data(), latency_rounds=0)
    assert record["check"]["labels"] == 64 and record["check"]["different_labels"] == 0
    found, batch = OnnxModel(tmp_path / "onnx" / "model.onnx"), routers.batch(40)
    with torch.no_grad():
        want, got, deep = logits(model, batch), logits(found, batch), call(model, batch).deep
        for rows in (slice(0, 1), deep, ~deep, deep & ~deep):  # one row, all deep, all fast, none at all
            part = {name: value[rows] for name, value in batch.items()}
            assert torch.equal(logits(found, part).argmax(-1), want[rows].argmax(-1))
    assert deep.any() and not deep.all() and torch.equal(got.argmax(-1), want.argmax(-1))
