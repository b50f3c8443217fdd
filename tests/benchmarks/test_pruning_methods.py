"""The table of pruning methods, on a model that learned a little from real package descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .conftest import EXTRACT, script

script("bench_quantization_methods")
bench = script("bench_pruning_methods")


def test_every_method_is_in_the_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--texts", "60", "--samples", "24", "--max-length", "24", "--sparsity", "0.5", "--batch-size", "16"]
    bench.main(["--model", str(model), "--data", str(EXTRACT), "--json", str(tmp_path / "out.json"), *words])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    found = {(row["name"], row["share"]): row for row in rows}
    assert len(found) == 1 + 2 + 4 + 2 * 3 and found["as it is", "0"]["kl"] == 0
    baseline = found["textbook sparsegpt", "0.5"]
    assert baseline["ratio"] == [1, 1, 1] and found["pykd wanda", "2:4"]["ratio"] is None
    for name in ("pykd sparsegpt", "pykd random"):
        ratio, low, high = found[name, "0.5"]["ratio"]
        assert low <= ratio <= high and ratio == pytest.approx(found[name, "0.5"]["kl"] / baseline["kl"])
    assert found["pykd sparsegpt", "0.5"]["kl"] < 0.8 * found["pykd random", "0.5"]["kl"]
    assert found["pykd wanda", "0.5"]["kl"] == pytest.approx(found["textbook wanda", "0.5"]["kl"], rel=0.05)
    assert capsys.readouterr().out.count("\n| pykd") == 4 + 2 * 3


def test_the_interval_is_of_the_ratio_of_means_over_the_same_texts() -> None:
    baseline = torch.rand(400).double() + 0.5
    assert bench.interval(0.7 * baseline, baseline, seed=0) == (pytest.approx(0.7),) * 3
    ratio, low, high = bench.interval(torch.rand(400).double() + 0.5, baseline, seed=0)
    spread = (torch.rand(400).double().std() * 2**0.5 / 20).item()
    assert low < ratio < high and 2 * spread < high - low < 6 * spread
