"""Continued learning: a saved student learns new data and keeps the old, because a share of it is replayed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykd
from pykd.data import DataBundle, load_text, with_replay
from pykd.data.bundle import stack
from pykd.distillation import distill
from pykd.errors import DataError
from pykd.models.huggingface import load_huggingface
from pykd.training.held_out import held_out


def texts(path: Path, words: tuple[str, str], tokenizer: Any) -> DataBundle:
    """Texts whose class is told by one of two words."""
    rows = [f"the {words[i % 2]} is number {i % 7},{i % 2}" for i in range(60)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return load_text(path, tokenizer=tokenizer, test_size=20)


def test_a_saved_student_learns_more_and_forgets_little(tmp_path: Path, tokenizer: Any) -> None:
    old = texts(tmp_path / "old.csv", ("game", "font"), tokenizer)
    new = texts(tmp_path / "new.csv", ("thing", "tool"), tokenizer)
    both = with_replay(new, old, share=1.0)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = {"model_type": "bert", "vocab_size": len(tokenizer), **body}
    fast: dict[str, Any] = {"lr": 3e-3, "batch_size": 20, "progress": False}
    torch.manual_seed(0)
    teacher = pykd.finetune(load_huggingface(None, num_labels=2, config=config), both, epochs=25, **fast)
    assert held_out(teacher, old)["accuracy"] > 0.9 and held_out(teacher, new)["accuracy"] > 0.9
    from pykd.models.students import derive

    student = distill(derive(teacher, hidden_size=16), teacher, old, epochs=25, **fast)
    pykd.save_pretrained(student, tmp_path / "artifact")
    again = pykd.from_pretrained(tmp_path / "artifact")
    before = held_out(again, old)
    distill(again, teacher, with_replay(new, old, share=0.5), epochs=25, **fast)
    assert held_out(again, new)["accuracy"] > 0.9 and held_out(again, old)["accuracy"] >= before["accuracy"] - 0.05
    assert [entry["stage"] for entry in again.pykd_report] == ["derive", "distill", "distill"]


def blobs(name: str, size: int = 40, classes: int = 2) -> DataBundle:
    items = [{"pixel_values": torch.full((3,), float(i)), "labels": i % classes} for i in range(size)]
    names = [str(n) for n in range(classes)]
    return DataBundle(items, items[:4], stack, names, name, fingerprint=f"{name}-{size}")


def test_what_is_replayed_is_a_function_of_the_seed() -> None:
    new, old = blobs("new"), blobs("old", 100)
    one, same, other = (with_replay(new, old, share=0.2, seed=seed) for seed in (1, 1, 2))
    assert len(one.train) == 60 and one.test is new.test
    drawn = [[float(bundle.train[i]["pixel_values"][0]) for i in range(40, 60)] for bundle in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 20
    assert one.fingerprint == same.fingerprint not in (other.fingerprint, new.fingerprint)
    assert one.preprocessing["replay"] == {"name": "old", "share": 0.2, "seed": 1}
    model = nn.Linear(3, 2)
    distill(model, nn.Linear(3, 2), one, batch_size=20, progress=False)
    assert model.pykd_report[-1]["steps"] == 3


def test_what_cannot_be_replayed(tokenizer: Any, bundles: dict[str, DataBundle]) -> None:
    with pytest.raises(DataError, match="above 0 and at most 1, got 0"):
        with_replay(blobs("new"), blobs("old"), share=0)
    with pytest.raises(DataError, match=r"'old' cannot be replayed with 'new': its class names is \['0', '1', '2'\]"):
        with_replay(blobs("new"), blobs("old", classes=3))
    with pytest.raises(DataError, match="its task is masked-lm, not causal-lm"):
        with_replay(bundles["causal-lm"], bundles["masked-lm"])
    data = bundles["sequence-classification"]
    with pytest.raises(DataError, match=r"its tokenizer is none, not \w+ of \d+ tokens"):
        with_replay(data, dataclasses.replace(data, tokenizer=None))
