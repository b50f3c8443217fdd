"""From a recipe's words to data, teachers, students, methods and chains, for every kind of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pykd
from pykd.errors import RecipeError
from pykd.models.layers import layer_map
from pykd.pipeline.details import curves_of
from pykd.pipeline.sources import build_data, build_model, build_student, task_of
from pykd.pipeline.stages import Context, apply_stage
from pykd.recipe import Recipe, load_recipe

NOUNS = ("game", "font", "library", "editor", "driver", "parser")
BODY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": ({}, {"model_type": "bert", **BODY}, "BertForSequenceClassification"),
    "tokens": ({}, {"model_type": "camembert", **BODY}, "CamembertForTokenClassification"),
    "pairs": ({"max_target_length": 8, "prefix": "the "}, T5, "T5ForConditionalGeneration"),
    "language": ({"pack": True}, {"model_type": "llama", **BODY}, "LlamaForCausalLM"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Callable[..., Any]) -> Path:
    """Rows for every kind of data, older rows, and a tokenizer."""
    path = tmp_path_factory.mktemp("sources")
    for name, first in (("rows", 0), ("older", 100)):
        rows = []
        for i in range(first, first + 60):
            text = f"the {NOUNS[i % 6]} is number {i % 10}"
            tags = ["B" if word in NOUNS else "O" for word in text.split()]
            rows.append({"text": text, "label": NOUNS[i % 2], "tokens": text.split(), "tags": tags, "source": text,
                         "target": NOUNS[i % 6]})  # fmt: skip
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["the is number 0 1 2 3 4 5 6 7 8 9", " ".join(NOUNS)]
    word_tokenizer(words).save_pretrained(path / "tokenizer")
    return path


def recipe(folder: Path, kind: str, *stages: dict[str, Any], student: Any = None, **data: Any) -> Recipe:
    extra, config, _ = KINDS[kind]
    source = {"kind": kind, "path": str(folder / "rows.jsonl"), "tokenizer": str(folder / "tokenizer"),
              "max_length": 16, "test_size": 12, **extra, **data}  # fmt: skip
    teacher = {"source": "huggingface", "config": config, "train": {"max_steps": 4, "batch_size": 8, "lr": 0.003}}
    steps = list(stages) or [{"distill": {"max_steps": 2, "batch_size": 8}}]
    content = {"name": "x", "data": source, "teacher": teacher, "stages": steps}
    return load_recipe(content if student is None else {**content, "student": student})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_text_has_its_task(kind: str, folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, kind, student={"depth": 1})
    data = build_data(made)
    teacher = build_model(made.teacher, made, data, key="teacher")
    assert type(teacher).__name__ == KINDS[kind][2] and teacher.config.vocab_size == len(data.tokenizer)
    assert teacher.config.pad_token_id == data.tokenizer.pad_token_id
    if kind == "pairs":
        assert teacher.config.decoder_start_token_id == data.tokenizer.pad_token_id
    student = build_student(made, teacher, data)
    assert all(len(layers) == 1 for layers in layer_map(student).values())
    if data.class_names:
        assert student.config.id2label == dict(enumerate(data.class_names))
        assert student.config.label2id[data.class_names[1]] == 1
    context = Context(made, data, teacher, tmp_path, False, "1-distill")
    apply_stage(made.stages[0], student, context)
    assert student.pykd_report[-1]["steps"] == 2
    task = {"text": "classification", "tokens": "token-classification", "pairs": "seq2seq-lm", "language": "causal-lm"}
    assert data.task == task[kind] and (task_of(made) == data.task or kind == "text")


def test_masked_language_models(folder: Path) -> None:
    made = recipe(folder, "language", student={"depth": 1}, task="masked-lm", pack=False, mask_share=0.5)
    assert build_data(made).task == task_of(made) == "masked-lm"


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_older_data_is_replayed(kind: str, folder: Path) -> None:
    alone = build_data(recipe(folder, kind, student={"depth": 1}))
    replay = {"path": str(folder / "older.jsonl"), "share": 0.5}
    both = build_data(recipe(folder, kind, student={"depth": 1}, replay=replay))
    older = build_data(recipe(folder, kind, student={"depth": 1}, path=str(folder / "older.jsonl")))
    assert len(both.train) == len(alone.train) + round(0.5 * len(older.train))
    assert both.class_names == alone.class_names and both.fingerprint != alone.fingerprint


def test_students_by_preset_size_and_choice_of_layers(folder: Path) -> None:
    made = recipe(folder, "text", student={"depth": 1})
    data = build_data(made)
    teacher = build_model(made.teacher, made, data, key="teacher")

    def student(**spec: Any) -> Any:
        return build_student(recipe(folder, "text", student=spec), teacher, data)

    assert student(preset="2x16").config.hidden_size == 16
    assert layer_map(student(layers=[0, 2])) == {"bert.encoder.layer": [0, 2]}
    assert len(layer_map(student(depth=2, layers="influence"))["bert.encoder.layer"]) == 2
    narrow = student(hidden_size=24, heads=3, intermediate_size=20).config
    assert (narrow.num_attention_heads, narrow.intermediate_size) == (3, 20)
    other = student(preset="2x48", config={"model_type": "distilbert"})
    assert type(other).__name__ == "DistilBertForSequenceClassification" and other.config.dim == 48
    assert other.config.vocab_size == len(data.tokenizer)
    with pytest.raises(RecipeError, match="student: hidden_size must be between 1 and the teacher's 32, got 64"):
        student(hidden_size=64)


def test_methods_with_weights_and_further_teachers(folder: Path, tmp_path: Path) -> None:
    plain = recipe(folder, "text", student={"depth": 1})
    data = build_data(plain)
    teacher = build_model(plain.teacher, plain, data, key="teacher")
    pykd.save_pretrained(teacher, tmp_path / "other", tokenizer=data.tokenizer)
    settings = {"max_steps": 2, "batch_size": 8, "method": {"logits": 1.0, "hidden": {"weight": 0.5}},
                "teacher_scheme": "w8a8", "teacher_weight": 3.0,
                "teachers": [{"name": str(tmp_path / "other")}]}  # fmt: skip
    made = recipe(folder, "text", {"distill": settings}, student={"depth": 1})
    student = build_student(made, teacher, data)
    apply_stage(made.stages[0], student, Context(made, data, teacher, tmp_path / "c", False, "1-distill"))
    entry = student.pykd_report[-1]
    assert entry["method"] == "logits + hidden" and entry["parameters"]["teacher_weights"] == [0.75, 0.25]
    assert entry["parameters"]["teacher_scheme"] == "w8a8"


def test_a_chain_is_a_stage(folder: Path, tmp_path: Path) -> None:
    students = {"medium": {"depth": 2}, "small": {"depth": 1, "hidden_size": 16}}
    made = recipe(
        folder, "text", {"chain": {"max_steps": 2, "batch_size": 8, "students": students, "arms": ["direct"]}}
    )
    data = build_data(made)
    torch.manual_seed(0)
    teacher = build_model(made.teacher, made, data, key="teacher")
    context = Context(made, data, teacher, tmp_path / "chain", False, "1-chain", tmp_path / "events.jsonl")
    first = apply_stage(made.stages[0], teacher, context)
    entry = first.pykd_report[-1]
    assert entry["method"] == "teacher -> medium -> small" and first.config.hidden_size == 16
    assert [(link["student"], link["arm"]) for link in entry["links"]][1:] == [
        ("medium", "chain"), ("small", "chain"), ("small", "direct")]  # fmt: skip
    curves = curves_of(tmp_path / "events.jsonl", ["teacher-teacher", "medium-chain", "small-chain", "small-direct"])
    assert {name: [record["step"] for record in curve] for name, curve in curves.items()} == {
        "medium-chain": [1, 2], "small-chain": [1, 2], "small-direct": [1, 2]}  # fmt: skip
    assert all({"step", "loss", "lr"} <= set(record) and "time" not in record for record in curves["medium-chain"])
    assert curves_of(tmp_path / "none.jsonl", ["medium-chain"]) == {}
    again = apply_stage(made.stages[0], teacher, context)  # finished links are taken from the folder
    assert again.pykd_report[-1]["links"] == entry["links"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student": {"preset": "6by512"}}, "student.preset: unknown preset '6by512'"),
        ({"student": {"depth": 1, "layers": "best"}}, "student.layers.*: unknown choice of layers 'best'"),
        (
            {"stages": [{"distill": {"method": "hiden"}}]},
            r"stages\[0\].distill.method: unknown method 'hiden': did you",
        ),
        (
            {"stages": [{"distill": {"method": {"logits": -1}}}]},
            "the weight of method 'logits' must be a positive number",
        ),
        ({"stages": [{"distill": {"teacher_scheme": "w8"}}]}, "teacher_scheme: unknown teacher_scheme 'w8'"),
        ({"stages": [{"chain": {"students": {"a": {"depth": 1}}}}]}, r"stages\[0\].chain makes its own students"),
        ({"data": {"kind": "token", "path": "x.csv"}}, "data.kind: unknown kind 'token': did you mean 'tokens'"),
        ({"data": {"kind": "pairs", "path": "x.csv", "target": "de"}}, "data.target: unknown key 'target'"),
    ],
)
def test_what_a_recipe_cannot_say(change: dict[str, Any], sentence: str, folder: Path) -> None:
    content = recipe(folder, "text", student={"depth": 1}).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe({**content, **change})
