"""Operations, memory and parts of models, against numbers that can be counted by hand."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykd
from pykd.data.bundle import DataBundle
from pykd.evaluation import evaluate, footprint
from pykd.evaluation.counting import count_parameters
from pykd.evaluation.footprint import components, count_flops, peak_memory, resident_bytes
from pykd.evaluation.latency import measure_speeds
from pykd.models.huggingface import load_huggingface

BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}


def bert() -> nn.Module:
    return load_huggingface(None, task="sequence-classification", num_labels=3, config=BERT).eval()


TOKENS = {"input_ids": torch.arange(2 * 8).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w8a16"])
def test_packed_layers_count_as_the_products_they_compute(scheme: str) -> None:
    dense = bert()
    want = count_flops(dense, TOKENS)
    linear = 2 * 16 * (4 * 64 * 64 + 2 * 64 * 128) * 2  # two a weight, 16 positions, six matrices a layer, two layers
    assert linear < want < 1.2 * linear
    assert count_flops(pykd.quantize(dense, scheme), TOKENS) == want


def test_sparse_layers_count_what_they_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    pykd.prune(model, sparsity=0.75)
    kept = count_parameters(model[0])[1] - 64
    assert count_flops(model, {"x": torch.zeros(5, 64)}) == 2 * 5 * (kept + 64 * 4)


def test_convolutions_count_their_positions() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1, stride=2))
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    want = 2 * 2 * (64 * 8 * 27 + 16 * 16 * 8)
    assert count_flops(conv, batch) == want
    assert count_flops(pykd.quantize(conv, "w8a16"), batch) == want


def test_parts_hold_all_parameters() -> None:
    model = bert()
    found = components(model)
    assert sum(found.values()) == count_parameters(model)[0]
    assert found["classifier"] == 3 * 64 + 3 and "bert.embeddings" in found and len(found) > 4


def test_memory_is_the_tensors_and_the_pass() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 4 * (64 + 8 + 8)
    wide = nn.Sequential(nn.Linear(4, 1 << 20, bias=False), nn.ReLU())
    found = peak_memory(wide, {"x": torch.zeros(8, 4)})
    assert found is not None and found >= resident_bytes(wide) + 4 * 8 * (1 << 20) // 2


def test_memory_that_cannot_be_read_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def write_text(self, *args: Any, **options: Any) -> None:
            raise PermissionError(errno.EACCES, "not allowed")

    monkeypatch.setattr(footprint, "RESET", Refusing())
    assert peak_memory(nn.Linear(2, 2), {"x": torch.zeros(1, 2)}) is None


def test_speeds_at_sizes_and_lengths() -> None:
    seen = []
    model = bert()
    model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    found = measure_speeds(model, TOKENS, [1, 5], [4, 16], rounds=2)
    assert [(s.batch_size, s.length) for s in found] == [(1, 4), (5, 4), (1, 16), (5, 16)]
    assert set(seen) == {(1, 4), (5, 4), (1, 16), (5, 16)}
    assert all(
        s.p50_ms <= s.p95_ms <= s.p99_ms and s.per_s == pytest.approx(1000 * s.batch_size / s.p50_ms) for s in found
    )
    assert [s.length for s in measure_speeds(model, TOKENS, [1], rounds=1)] == [8]
    with pytest.raises(ValueError, match="batch sizes and lengths must be at least 1"):
        measure_speeds(model, TOKENS, [0])


def test_a_report_holds_it_all(corners: DataBundle, tmp_path: Path) -> None:
    report = evaluate(nn.Linear(3, 3), corners, latency_rounds=5, batch_sizes=(1, 2), lengths=(7,))
    assert [(s.batch_size, s.length) for s in report.speeds] == [(1, 0), (2, 0)]
    assert report.flops == 18 and report.components == {"": 12}
    low, high = report.intervals["accuracy"]
    assert low <= report.accuracy <= high and set(report.intervals) == {"accuracy", "precision", "recall", "f1"}
    assert type(report).from_dict(report.to_dict()) == report
