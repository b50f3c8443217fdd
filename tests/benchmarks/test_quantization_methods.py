"""The table of quantization methods, on a model that learned a little from real package descriptions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pykd import save_pretrained
from pykd.models.huggingface import load_huggingface

from .conftest import CONFIG, EXTRACT, script

bench = script("bench_quantization_methods")


def run(model: Path, tmp_path: Path, *words: str) -> dict[str, Any]:
    options = ["--texts", "60", "--samples", "24", "--group-size", "32", "--max-length", "24"]
    bench.main(["--model", str(model), "--data", str(EXTRACT), "--json", str(tmp_path / "out.json"), *options, *words])
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_every_method_is_in_the_table(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "hqq", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run(model, tmp_path)
    rows = {row["name"]: row for row in found["rows"]}
    schemes = sum(len(methods) for _, _, methods in bench.SCHEMES)
    assert len(rows) == 1 + schemes + 2 + 3 * 3  # as it is, schemes, the textbook's, embeddings
    assert set(found["not_measured"]) == {*bench.PEERS, bench.TORCHAO_INT8}
    assert rows["as it is"]["kl"] == 0 and rows["as it is"]["flips"] == 0
    for name, row in rows.items():
        assert row["kl"] < 0.5 and 0 <= row["flips"] <= 60 and 0 <= row["accuracy"] <= 1
        assert name == "as it is" or 0 < row["size_bytes"] < rows["as it is"]["size_bytes"]
    assert rows["pykd w4a16 gptq"]["kl"] < rows["pykd w4a16 rtn"]["kl"]
    assert rows["as it is"]["output_error"] == rows["pykd embeddings w8a16"]["output_error"] == 0
    for name in ("gptq", "awq"):
        assert rows[f"pykd w4a16 {name}"]["output_error"] < 0.8 * rows["pykd w4a16 rtn"]["output_error"] < 0.02
    assert rows["pykd embeddings w8a16"]["kl"] < rows["pykd embeddings w4a16"]["kl"]
    together = rows["pykd w4a16 rtn + embeddings w8a16"]["size_bytes"]
    assert together < min(rows["pykd w4a16 rtn"]["size_bytes"], rows["pykd embeddings w8a16"]["size_bytes"])
    assert found["settings"]["group_size"] == 32 and found["environment"]
    out = capsys.readouterr().out
    assert out.count("\n| pykd") == schemes + 9 and "not measured: torchao int4 (ModuleNotFoundError" in out


def test_a_peer_rounds_the_same_layers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def halve(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        seen.append(tuple(weight.shape))
        return weight / 2, weight.numel() // 2

    monkeypatch.setattr(bench, "PEERS", {"half": lambda: halve})
    found = run(model, tmp_path, "--only", "half", "pykd nf4 rtn")
    before, ours, half = found["rows"]
    assert ours["name"] == "pykd nf4 rtn" and half["name"] == "half" and half["kl"] > ours["kl"] > 0
    weights = sum(out * columns for out, columns in seen)
    assert len(seen) == 7 and half["size_bytes"] == before["size_bytes"] - 4 * weights + weights // 2


def test_a_model_of_other_classes_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    net = load_huggingface(None, "sequence-classification", num_labels=2, config=CONFIG)
    folder = save_pretrained(net, tmp_path / "two", tokenizer=tokenizer)
    with pytest.raises(SystemExit, match=r"the model tells 2 classes apart, the data \d+: not a pair"):
        run(folder, tmp_path)
