"""The recipes for translation, named entities and guardrails, with models of a few thousand weights."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from pykd import from_pretrained, save_pretrained
from pykd.models.huggingface import load_huggingface
from pykd.models.sizes import size_of
from pykd.pipeline import export_saved, run
from pykd.recipe import load_recipe

from .shipped import FAST, RECIPES, TESTS, debian_rows

pytestmark = pytest.mark.usefixtures("quick")


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
        "teacher.train.max_steps=3", "student={depth: 1}", "stages[0].distill.max_steps=4",
        "stages[0].distill.validate_steps=2", "stages[1].qat.max_steps=2",
        "stages[1].qat.validate_steps=2", f"evaluate.bertscore_model={tmp_path / 'judge'}", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "translation.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical and done.final.size_bytes < 0.5 * done.teacher.size_bytes
    validated = done.measured[1].details["validations"]
    assert [entry["step"] for entry in validated] == [0, 2, 4] and "newly_right" in validated[1]
    packed = done.measured[2].details  # of the packing, with the training before it
    assert packed["method"] == "qat" and packed["changed"] and packed["training"]["parameters"]["max_steps"] == 2
    assert [entry["step"] for entry in packed["validations"]] == [0, 2] and len(packed["curve"]) == 2
    page, text = ((done.directory / name).read_text() for name in ("report.html", "report.md"))
    assert f"Guard, qat: {packed['outcome']}" in text and page.count("Worst errors at the last validation") == 2
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
    assert done.reload.identical and done.final.size_bytes < 0.5 * done.teacher.size_bytes
    assert {"f1", "precision", "recall"} <= set(done.final.metrics)
    assert re.search(r"reaches F1 0\.\d{4} \(the teacher F1 0\.\d{4}\) on \d+ held-out words", done.verdict())
    touched = done.measured[2].details["tensor_bytes"]
    assert touched["layers"] == 6 and 0.11 < 1 - touched["after"] / touched["before"] < 0.13
    (told,) = done.findings
    assert [row[0] for row in told.cells] == ["without", "stages.prune"] and told.cells[1][-1].endswith("x")
    assert float(told.cells[1][6]) <= float(told.cells[1][5]), "pruned weights in 8 bits take no more than dense ones"


@pytest.mark.parametrize("short", [False, True])
def test_the_sizes_of_the_study_fall(short: bool) -> None:
    recipe = load_recipe(RECIPES / "study.yaml", short=short)
    chain = recipe.stages[0].chain
    assert chain is not None and recipe.teacher.preset is not None
    presets = [recipe.teacher.preset, *(student.preset for student in chain.students.values())]
    sizes = [size_of(preset) for preset in presets if preset]
    weights = [size.depth * (4 * size.hidden_size**2 + 2 * size.hidden_size * size.intermediate_size) for size in sizes]
    assert len(weights) == 6 and weights == sorted(weights, reverse=True)
    full = {"12x768", "6x768", "6x512", "12x384", "2x384", "4x312"}
    assert short or {recipe.teacher.preset, *chain.students} == full


def test_guardrail(tmp_path: Path) -> None:
    source = TESTS / "data_files" / "debian_pairs.csv"  # any 200 texts: the classes are whether they are long
    with source.open(encoding="utf-8", newline="") as file:
        texts = [row["source"] for row in csv.DictReader(file)]
    middle = sorted(map(len, texts))[100]
    rows = [
        {
            "text": text,
            "label": "flagged" if len(text) > middle else "passed",
            "split": "train" if number % 4 else "test",
        }
        for number, text in enumerate(texts)
    ]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as made:
        writer = csv.DictWriter(made, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    tokenizer = debian_rows.train_tokenizer(texts, 300)
    encoder = {"model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
               "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    teacher = load_huggingface(None, "sequence-classification", num_labels=2, config=encoder)
    save_pretrained(teacher, tmp_path / "bert", tokenizer=tokenizer)
    overrides = [
        f"data.path={tmp_path / 'rows.csv'}", f"teacher.name={tmp_path / 'bert'}", "teacher.train.max_steps=3",
        "student.router.shared_layers=1", "student.router.deep_layers=1", "student.router.expert_size=32",
        "stages[0].distill.max_steps=3", *FAST,
    ]  # fmt: skip
    done = run(RECIPES / "guardrail.yaml", output_dir=tmp_path / "out", overrides=overrides, progress=False)
    assert done.reload.identical and [entry.stage for entry in done.measured][-1] == "3-calibrate"
    routing = done.final.routing
    assert routing is not None and routing.deep_share == pytest.approx(0.3, abs=0.03)
    assert "each row its branch" in (done.directory / "report.md").read_text()
    told = export_saved(done.directory / "model", tmp_path / "onnx", format="onnx")
    counted = r"rows at the threshold that took their other branch: \d+; tokens that took another expert as good: \d+"
    assert re.fullmatch(rf"\d+ of 50 labels equal, .*; {counted}", told["check"])
    assert (tmp_path / "onnx" / "tokenizer.json").exists() and "onnxruntime" in told["latency"]
