"""A tokenizer with every special token, and small files of each kind of text data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykd.data import DataBundle, load_language, load_pairs, load_text, load_tokens

NOUNS = ("game", "font", "library", "editor", "driver", "parser")
KINDS = ("thing", "tool", "module", "set", "kit")


def rows() -> list[dict[str, Any]]:
    found = []
    for i in range(48):
        noun, other = NOUNS[i % 6], KINDS[i * 7 % 5]
        text = f"the {noun} is a {other} for number {i % 10}"
        tags = ["B" if word == noun else "O" for word in text.split()]
        found.append({"text": text, "label": noun in NOUNS[:3], "tokens": text.split(), "tags": tags,
                      "source": text, "target": f"{other} and {noun}"})  # fmt: skip
    return [{**row, "label": str(row["label"])} for row in found]


@pytest.fixture(scope="session")
def tokenizer(word_tokenizer: Callable[..., Any]) -> Any:
    return word_tokenizer([row[name] for row in rows() for name in ("source", "target")])


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, DataBundle]:
    """One bundle for each task."""
    path: Path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    common: dict[str, Any] = {"tokenizer": tokenizer, "test_size": 8, "max_length": 16}
    return {
        "sequence-classification": load_text(path, **common),
        "token-classification": load_tokens(path, **common),
        "seq2seq-lm": load_pairs(path, **common),
        "causal-lm": load_language(path, **common),
        "masked-lm": load_language(path, task="masked-lm", **common),
    }
