"""The table of combinations, on a model that learned a little from real package descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pykd import from_pretrained

from .conftest import EXTRACT, script

bench = script("bench_combinations")


def test_combinations_are_made_once_and_timed_beside_their_parts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--texts", "40", "--max-length", "24", "--epochs", "0.2", "--group-size", "32", "--rounds", "2"]
    words += ["--length", "12", "--keep", str(tmp_path), "--only", "w4a16", "neurons 30 %*"]
    for _ in range(2):
        bench.main(["--model", str(model), "--data", str(EXTRACT), *words])
        found = {row["name"]: row for row in json.loads((tmp_path / "combinations.json").read_text())}
        assert list(found) == ["w4a16", "neurons 30 %", "neurons 30 %, w8a8", "neurons 30 %, w4a8"]
    out = capsys.readouterr().out
    assert out.count("made: ") == 8 and len(list((tmp_path / "structures").iterdir())) == 1
    for row in found.values():
        assert row["ms"] > 0 and row["x float32"] > 0 and 0 < row["accuracy"] <= 1 and row["kl"] > 0 <= row["flips"]
        assert f"| {row['name']} | {row['encoder']:.2f} | {row['file']:.2f} | " in out
    assert (
        6 < found["w4a16"]["encoder"] < 8 and found["neurons 30 %"]["encoder"] < found["neurons 30 %, w8a8"]["encoder"]
    )
    packed: Any = from_pretrained(tmp_path / "models" / "w4a16")
    layers = packed.bert.encoder.layer[0]
    one = sum(tensor.nbytes for tensor in layers.intermediate.dense.state_dict().values())
    assert one == 96 * 64 // 2 + 2 * 96 * 2 + 4 * 96 and bench.encoder_bytes(packed) > one


def rows(**values: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"name": name, "file": file, "ms": ms, "encoder": 9.0, "kept": 1.0, "x float32": 4.0, "x int8": 1.3}
        for name, (file, ms) in values.items()
    ]


def test_what_is_larger_or_slower_than_a_part_is_said() -> None:
    found = rows(**{"w8a8": (4.0, 2.0), "neurons 30 %": (1.5, 3.0), "neurons 30 %, w8a8": (3.9, 2.2)})
    assert bench.beside_parts(found, 0.05) == [
        "larger than its part: neurons 30 %, w8a8 is 3.90x smaller than float32, w8a8 alone 4.00x",
        "slower than its part: neurons 30 %, w8a8 takes 1.10x the time of w8a8",
    ]
    assert len(bench.beside_parts(found, 0.2)) == 1


def test_the_smallest_within_all_goals_or_how_close_the_nearest_comes() -> None:
    found = rows(a=(6.0, 1.0), b=(7.0, 2.0), c=(6.6, 1.0))
    assert bench.verdict(found, [8, 6.5, 0.97, 3.5, 1.2]) == "within every goal: b, the smallest of 2"
    said = bench.verdict(found, [8, 14, 0.97, 3.5, 2.6])
    assert said == "none is within every goal; b comes closest and misses file 7 of 14, x int8 1.3 of 2.6"
