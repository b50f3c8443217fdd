"""The table of quantization methods, on a model that learned a little from real package descriptions."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pykd import from_pretrained, save_pretrained
from pykd.data import load_text
from pykd.data.bundle import permutation
from pykd.models.huggingface import load_huggingface

from .conftest import CONFIG, EXTRACT, script

bench = script("bench_quantization_methods")
quality = script("quality")
answers = script("answers")


def run(model: Path, tmp_path: Path, *words: str) -> dict[str, Any]:
    options = ["--texts", "60", "--samples", "24", "--group-size", "32", "--max-length", "24", "--rounds", "2"]
    bench.main(["--model", str(model), "--data", str(EXTRACT), "--json", str(tmp_path / "out.json"), *options, *words])
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_every_method_is_in_the_table(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "hqq", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(bench.GROUPED, "ONNX Runtime int4, int8 activations")  # tracing takes its time
    found = run(model, tmp_path)
    rows = {row["name"].removesuffix(" g=32"): row for row in found["rows"]}
    schemes = len(bench.WITHOUT_GROUPS) + sum(len(methods) for _, _, methods in bench.SCHEMES)
    # as it is, schemes, plain and textbook, embeddings, torch's int8, ONNX Runtime's int8 and int4
    assert len(rows) == 1 + schemes + 4 + 3 * 3 + 1 + 2
    assert set(found["not_measured"]) == {"torchao int8 per token", *(f"{name} g=32" for name in bench.PEERS)}
    assert rows["as it is"]["kl"] == 0 and rows["as it is"]["flips"] == 0
    for name, row in rows.items():
        assert row["kl"] < 0.5 and 0 <= row["flips"] <= 60 and 0 <= row["accuracy"] <= 1
        assert name == "as it is" or 0 < row["size_bytes"] < rows["as it is"]["size_bytes"]
    assert rows["pykd w4a16 gptq"]["kl"] < rows["pykd w4a16 rtn"]["kl"]
    assert rows["as it is"]["output_error"] == rows["pykd embeddings w8a16"]["output_error"] == 0
    for name in ("gptq", "awq"):
        assert rows[f"pykd w4a16 {name}"]["output_error"] < 0.8 * rows["pykd w4a16 rtn"]["output_error"] < 0.02
    for name in ("ONNX Runtime int4", "ONNX Runtime dynamic int8"):
        assert rows[name]["kl"] > 0 and rows[name]["output_error"] is None and rows[name]["p50_ms"] > 0
    assert 0.3 < rows["ONNX Runtime int4"]["kl"] / rows["plain rounding"]["kl"] < 3  # the same but for the scales' type
    assert all(row["p50_ms"] > 0 < row["faster"] for row in rows.values())
    assert rows["pykd w8a16"]["output_error"] < rows["torch dynamic int8"]["output_error"] < 0.01
    assert rows["pykd embeddings w8a16"]["kl"] < rows["pykd embeddings w4a16"]["kl"]
    together = rows["pykd w4a16 rtn + embeddings w8a16"]["size_bytes"]
    assert together < min(rows["pykd w4a16 rtn"]["size_bytes"], rows["pykd embeddings w8a16"]["size_bytes"])
    assert found["settings"]["group_size"] == [32] and found["environment"]
    out = capsys.readouterr().out
    assert "not measured: torchao int4 g=32 (ModuleNotFoundError" in out


def test_rows_that_training_never_took_are_held_out(model: Path, tmp_path: Path) -> None:
    """Training rows after the first 100 in the order in which a run takes them, each once, beside the test split."""
    found = run(model, tmp_path, "--only", "pykd w8a8", "--trained-rows", "100")
    data = load_text(EXTRACT, tokenizer=model, text_column="text", label_column="label", test_size=60)
    more = quality.with_unseen(data, 100, seed=0)
    order = permutation(len(data.train), seed=0)
    assert [row["text"] for row in more.train] == [data.train[index]["text"] for index in order[:100]]
    assert len(more.test) == len(data.test) + len(data.train) - 100
    assert more.test[len(data.test)]["text"] == data.train[order[100]]["text"]
    assert more.fingerprint != data.fingerprint and found["rows"]


def test_variants_are_held_against_others_text_by_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured one at a time, kept, and printed together without being measured again."""
    keep = ["--keep", str(tmp_path / "kept"), "--only"]
    names = ["plain rounding g=32", "textbook gptq g=32", "pykd w4a16 gptq g=32"]
    for name in names[:2]:
        run(model, tmp_path, *keep, name)
    first = run(model, tmp_path, *keep, names[2])["rows"][-1]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    capsys.readouterr()
    again = run(model, tmp_path, *keep, *names)["rows"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*-*")} == {
        name: at for name, at in before.items() if "-" in name
    }
    assert [row["name"] for row in again] == ["as it is", *names] and again[-1] == first
    for name, row in zip(names[:2], again[1:], strict=False):
        ratio, low, high = first["ratios"][name]["kl"]
        assert low <= ratio <= high and ratio == pytest.approx(first["kl"] / row["kl"])
        flips = first["ratios"][name]["flips"]
        assert flips is None or flips[0] == pytest.approx(first["flips"] / row["flips"])
    assert f"| {names[2]} | {names[0]} | {first['ratios'][names[0]]['kl'][0]:.3f} [" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"kept keeps results of another samples: choose another folder"):
        run(model, tmp_path, *keep, names[0], "--samples", "25")
    run_list = ["--model", "none", "--data", "none", "--list", "--group-size", "32", "128"]
    bench.main(run_list)
    listed = capsys.readouterr().out.splitlines()
    assert {*names, "pykd w4a16 gptq g=128", "pykd w8a8"} < set(listed) and len(set(listed)) == len(listed)


def test_the_interval_is_of_the_ratio_of_means_over_the_same_texts() -> None:
    torch.manual_seed(0)
    baseline = torch.rand(400).double() + 0.5
    assert answers.interval(0.7 * baseline, baseline, seed=0) == (pytest.approx(0.7),) * 3
    ratio, low, high = answers.interval(torch.rand(400).double() + 0.5, baseline, seed=0)
    spread = (torch.rand(400).double().std() * 2**0.5 / 20).item()
    assert low < ratio < high and 2 * spread < high - low < 6 * spread
    assert answers.interval(baseline, torch.zeros(400).double(), seed=0) is None


@pytest.mark.parametrize("inner", [7, 1040, 1041])
def test_products_of_whole_numbers_are_exact(inner: int) -> None:
    left, right = torch.full((2, inner), 127, dtype=torch.int8), torch.full((inner, 3), -127, dtype=torch.int8)
    right[0], scales = 126, torch.tensor([[1.0], [0.5]])
    want = (left.long() @ right.long()).float() * scales
    assert torch.equal(script("quantization_peers").exact_products(left, right, scales), want)


def test_a_peer_rounds_the_same_layers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def halve(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        seen.append(tuple(weight.shape))
        return weight / 2, weight.numel() // 2

    monkeypatch.setitem(bench.PEERS, "half", lambda: halve)
    found = run(model, tmp_path, "--only", "half*", "pykd nf4 rtn*")
    before, ours, half = found["rows"]
    assert ours["p50_ms"] > 0 and "p50_ms" not in half
    assert ours["name"] == "pykd nf4 rtn g=32" and half["name"] == "half g=32" and half["kl"] > ours["kl"] > 0
    weights = sum(out * columns for out, columns in seen)
    assert len(seen) == 7 and half["size_bytes"] == before["size_bytes"] - 4 * weights + weights // 2


def test_a_model_of_other_classes_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    net = load_huggingface(None, "sequence-classification", num_labels=2, config=CONFIG)
    folder = save_pretrained(net, tmp_path / "two", tokenizer=tokenizer)
    with pytest.raises(SystemExit, match=r"the model tells 2 classes apart, the data \d+: not a pair"):
        run(folder, tmp_path)


def test_the_teacher_is_trained_on_the_rows_to_train_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EXTRACT.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:120]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        splits = ["train" if index % 4 else "test" for index in range(len(rows))]
        writer.writerows([row["text"], row["label"], split] for row, split in zip(rows, splits, strict=True))
    words = ["--data", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "out"), "--start", str(model)]
    script("teacher").main([*words, "--epochs", "0.5", "--max-length", "24"])
    assert re.search(r"loss \d\.\d{4}, accuracy \d\.\d{4}\n", capsys.readouterr().out)
    trained: Any = from_pretrained(tmp_path / "out")
    assert trained.config.num_labels == len({row["label"] for row in rows}) and trained.pykd_report[-1]["steps"] == 1
