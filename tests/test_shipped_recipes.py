"""The recipes for translation and named entities, on hand-made rows with models of a few thousand weights."""

from __future__ import annotations

import csv
import functools
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd import from_pretrained, save_pretrained
from pykd.evaluation import measure
from pykd.models.huggingface import load_huggingface
from pykd.pipeline import evaluate_saved, run
from pykd.pipeline.reload import Reload

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
sys.path.append(str(TESTS.parent / "benchmarks" / "data"))
debian_rows: Any = importlib.import_module("debian_rows")

FAST = ["evaluate.latency_rounds=1", "evaluate.speed_rounds=1", "evaluate.batch_size=20"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, no second of waiting for a throughput, and the reload in the same process."""

    def reload(model: Path, recipe: Path, predictions: Any, *, batch_size: int) -> Reload:
        found = evaluate_saved(model, recipe=recipe, batch_size=batch_size, latency_rounds=1).predictions
        return Reload("pykd evaluate", len(found), sum(a != b for a, b in zip(found, predictions, strict=True)))

    monkeypatch.setattr("pykd.pipeline.runner.check_reload", reload)
    monkeypatch.setattr(measure, "measure_throughput", functools.partial(measure.measure_throughput, seconds=0.01))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_translation(tmp_path: Path) -> None:
    source = TESTS / "data_files" / "debian_pairs.csv"
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    texts = [row[side] for row in rows for side in ("source", "target")]
    tokenizer = debian_rows.train_tokenizer(texts, 300)
    encoder = {"model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    judge = load_huggingface(None, "sequence-classification", num_labels=2, config=encoder)
    for folder in ("tokenizer", "judge"):
        tokenizer.save_pretrained(tmp_path / folder)
    judge.save_pretrained(tmp_path / "judge")
    overrides = [
        f"data.path={source}", f"data.tokenizer={tmp_path / 'tokenizer'}", "data.max_length=24",
        "data.max_target_length=16", "teacher.config.d_model=64", "teacher.config.d_kv=32", "teacher.config.d_ff=128",
        "teacher.config.num_layers=2", "teacher.config.num_decoder_layers=2", "teacher.config.num_heads=2",
        "teacher.train.max_steps=3", "student.depth=1", "stages[0].distill.max_steps=4",
        "stages[0].distill.validate_steps=2", f"evaluate.bertscore_model={tmp_path / 'judge'}", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "translation.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical and done.final.size_bytes < 0.5 * done.teacher.size_bytes
    validated = done.measured[1].details["validations"]
    assert [entry["step"] for entry in validated] == [2, 4] and "newly_right" in validated[1]
    assert {"bleu", "chrf", "ter", "bertscore"} <= set(done.final.metrics)
    assert f"reaches chrF {done.final.metrics['chrf']:.2f}, BLEU" in done.verdict() and "errors" not in done.verdict()
    assert "errors" not in (done.directory / "run.log").read_text()
    model = from_pretrained(done.directory / "model")
    assert model.config.num_layers == model.config.num_decoder_layers == 1


def test_named_entities(tmp_path: Path) -> None:
    source = TESTS / "data_files" / "debian_ner.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200
    tokenizer = debian_rows.train_tokenizer((" ".join(row["tokens"]) for row in rows), 300)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = {"model_type": "bert", "vocab_size": len(tokenizer), **shape}
    teacher = load_huggingface(None, "token-classification", num_labels=3, config=config)
    save_pretrained(teacher, tmp_path / "bert", tokenizer=tokenizer)
    overrides = [
        f"data.path={source}", f"teacher.name={tmp_path / 'bert'}", "teacher.train.max_steps=3", "student.depth=1",
        "stages[0].distill.max_steps=3", "stages[2].recover.max_steps=2", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "ner.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical and done.final.size_bytes < 0.3 * done.teacher.size_bytes
    assert {"f1", "precision", "recall"} <= set(done.final.metrics)
    assert re.search(r"reaches F1 0\.\d{4} \(the teacher F1 0\.\d{4}\) on \d+ held-out words", done.verdict())
