"""The table of pruning methods, on a model that learned a little from real package descriptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import EXTRACT, script

bench = script("bench_pruning_methods")


def test_every_method_is_in_the_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--texts", "60", "--samples", "24", "--max-length", "24", "--sparsity", "0.5", "--batch-size", "16"]
    bench.main(["--model", str(model), "--data", str(EXTRACT), "--json", str(tmp_path / "out.json"), *words])
    found = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert len(found) == 1 + 2 + 4 + 3 + 2 * 3 and found["as it is"]["kl"] == 0
    for name in ("heads", "neurons"):
        row = found[f"pykd {name} 50 %"]
        assert row["output_error"] is None and row["kl"] > 0 and row["size_bytes"] < found["as it is"]["size_bytes"]
    baseline = found["textbook sparsegpt 50 %"]
    assert baseline["ratios"] == {} and found["pykd wanda 2:4"]["ratios"] == {}
    for name in ("pykd sparsegpt", "pykd random"):
        ratio, low, high = found[f"{name} 50 %"]["ratios"]["textbook sparsegpt 50 %"]["kl"]
        assert low <= ratio <= high and ratio == pytest.approx(found[f"{name} 50 %"]["kl"] / baseline["kl"])
    assert found["pykd sparsegpt 50 %"]["kl"] < 0.8 * found["pykd random 50 %"]["kl"]
    assert found["pykd sparsegpt 50 %"]["output_error"] < baseline["output_error"]
    assert found["pykd wanda 50 %"]["kl"] == pytest.approx(found["textbook wanda 50 %"]["kl"], rel=0.05)
    assert found["pykd wanda 50 %"]["size_bytes"] < found["as it is"]["size_bytes"] == baseline["size_bytes"]
    out = capsys.readouterr().out
    assert out.count("\n| pykd") == 4 + 3 + 2 * 3 + 4 + 1 and out.count("| textbook wanda 50 % | 1.0") <= 1


def test_pruned_models_are_trained_under_the_teacher(model: Path, tmp_path: Path) -> None:
    words = ["--texts", "60", "--samples", "24", "--max-length", "24", "--sparsity", "0.7", "--batch-size", "16"]
    words += ["--recover", "0.5", "--recovered", "random", "movement", "--keep", str(tmp_path / "kept")]
    words += ["--json", str(tmp_path / "out.json"), "--only", "pykd random 70 %*", "pykd movement 70 %*"]
    for _ in range(2):
        bench.main(["--model", str(model), "--data", str(EXTRACT), *words])
        before, pruned, trained, moved = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert moved["size_bytes"] == pytest.approx(pruned["size_bytes"], rel=0.01) and moved["ratios"] == {}
        assert trained["name"] == "pykd random 70 %, 0.5 epochs at 0.0002" and list(trained["ratios"]) == [
            pruned["name"]
        ]
        assert trained["output_error"] != pruned["output_error"] and trained["size_bytes"] == pruned["size_bytes"]
        lost, low, high = trained["points_lost"]
        assert low <= lost <= high and lost == pytest.approx(100 * (before["accuracy"] - trained["accuracy"]))
    folder = tmp_path / "kept" / "pykd-random-70-0.5-epochs-at-0.0002"
    assert (folder / "checkpoint.json").exists() and folder.with_name(f"{folder.name}.json").exists()
