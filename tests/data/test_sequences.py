"""Tagged words, pairs of texts and plain texts: what a batch holds, and every row that cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd.data import DataBundle, load_language, load_pairs, load_tokens
from pykd.data.bundle import random_split, stack
from pykd.errors import DataError

TAGGED = [
    {"tokens": ["The", "fonts-noto", "package"], "tags": ["O", "B-PKG", "O"]},
    {"tokens": ["A", "game"], "tags": ["O", "O"]},
    {"tokens": ["python", "library"], "tags": ["B-PKG", "I-PKG"]},
    {"tokens": ["ruby", "gem", "for", "games"], "tags": ["B-PKG", "O", "O", "O"]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path, tokenizer: Any) -> None:
    data = load_tokens(write(tmp_path / "tags.jsonl", TAGGED), tokenizer=tokenizer, test_size=1)
    assert data.class_names == ("B-PKG", "I-PKG", "O") and data.task == "token-classification"
    words = ["fonts-noto", "x"]  # the tokenizer splits at the dash: three tokens, one label
    batch = data.collate([{"words": words, "labels": [0, 2]}, {"words": ["x"], "labels": [1]}])
    assert batch["labels"].tolist() == [[0, -100, -100, 2], [1, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert data.train[0]["text"] == " ".join(data.train[0]["words"])


def test_tags_as_text_and_as_numbers(tmp_path: Path, tokenizer: Any) -> None:
    lists = load_tokens(write(tmp_path / "a.jsonl", TAGGED), tokenizer=tokenizer, test_size=1)
    csv = tmp_path / "b.csv"
    csv.write_text("tokens,tags\n" + "".join(f"{' '.join(r['tokens'])},{' '.join(r['tags'])}\n" for r in TAGGED))
    joined = load_tokens(csv, tokenizer=tokenizer, test_size=1)
    names = ["B-PKG", "I-PKG", "O"]
    numbers = [{**row, "tags": [names.index(tag) for tag in row["tags"]]} for row in TAGGED]
    numbered = load_tokens(write(tmp_path / "c.jsonl", numbers), tokenizer=tokenizer, test_size=1, class_names=names)
    assert lists.fingerprint == joined.fingerprint == numbered.fingerprint
    assert [numbered.train[i] for i in range(3)] == [lists.train[i] for i in range(3)]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "line 2: 2 words but 1 labels; give every word one"),
        ({"tokens": [], "tags": []}, {}, r"line 2: column 'tokens' must hold a list, got \[\]"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, {}, "line 2: ' ' is no word"),
        ({"tokens": ["a"], "tags": ["B-PGK"]}, {"class_names": ["O", "B-PKG", "I-PKG"]}, "line 2: unknown label 'B-P"),
        ({"tokens": ["a"], "tags": [1]}, {}, "holds numbers such as 1; pass class_names"),
        ({"tokens": ["a"], "tags": ["O"]}, {"max_length": 1}, "max_length must be at least 2 tokens, got 1"),
        ({"tokens": ["a"], "tags": ["O"]}, {"labels_column": "tag"}, "unknown column 'tag': did you mean 'tags'"),
        ({"tokens": ["a"], "tags": ["O"]}, {"test_size": 5}, "with 5 examples it must lie between 1 and 4"),
    ],
)
def test_tagged_rows_that_cannot_be_used(
    row: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "tags.jsonl", [TAGGED[0], row, *TAGGED[1:]])
    with pytest.raises(DataError, match=message):
        load_tokens(path, tokenizer=tokenizer, **{"test_size": 1, **options})


def test_one_tag_alone_and_slow_tokenizers(tmp_path: Path) -> None:
    path = write(tmp_path / "tags.jsonl", [{"tokens": ["a"], "tags": ["O"]}] * 3)
    with pytest.raises(DataError, match="holds one single label; a tagger needs two"):
        load_tokens(path, tokenizer=object(), test_size=1)
    with pytest.raises(DataError, match="does not know which word a token is from; use a fast tokenizer"):
        load_tokens(write(path, TAGGED), tokenizer=[], test_size=1)


PAIRS = [{"source": f"a game number {i}", "target": "games " * (i % 3 + 1)} for i in range(8)]


def test_targets_are_labels_and_their_padding_does_not_count(tmp_path: Path, tokenizer: Any) -> None:
    data = load_pairs(write(tmp_path / "pairs.jsonl", PAIRS), tokenizer=tokenizer, test_size=2, prefix="name: ")
    assert data.task == "seq2seq-lm" and (len(data.train), len(data.test)) == (6, 2)
    batch = data.collate([{"source": "a game", "target": "games games"}, {"source": "a", "target": "games"}])
    game = tokenizer("games")["input_ids"][0]
    assert batch["labels"].tolist() == [[game, game], [game, -100]]
    plain = tokenizer(["name: a game", "name: a"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    short = load_pairs(tmp_path / "pairs.jsonl", tokenizer=tokenizer, test_size=2, max_target_length=2)
    assert short.collate([PAIRS[2]])["labels"].shape == (1, 2) and short.fingerprint != data.fingerprint
    for name in ("max_length", "max_target_length"):
        with pytest.raises(DataError, match=f"{name} must be at least 2 tokens, got 0"):
            load_pairs(tmp_path / "pairs.jsonl", tokenizer=tokenizer, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="line 1: column 'target' is empty"):
        load_pairs(write(tmp_path / "e.jsonl", [{"source": "a", "target": " "}]), tokenizer=tokenizer)


@pytest.fixture
def masking(tokenizer: Any) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"mask_token": "[MASK]", "eos_token": "[EOS]"})
    return other


def test_the_next_token(extract: Path, masking: Any) -> None:
    data = load_language(extract, tokenizer=masking, test_size=50, max_length=12)
    batch = data.collate([data.train[i] for i in range(16)])
    assert data.task == "causal-lm" and batch["input_ids"].shape[1] <= 12
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"][batch["attention_mask"] == 1], batch["input_ids"][batch["attention_mask"] == 1])
    packed = load_language(extract, tokenizer=masking, test_size=50, max_length=12, pack=True)
    assert {len(packed.train[i]["tokens"]) for i in range(len(packed.train))} == {12}
    stream = [token for i in range(len(packed.train)) for token in packed.train[i]["tokens"]]
    assert stream.count(masking.eos_token_id) == pytest.approx(len(data.train), abs=1)


def test_masked_tokens_are_a_function_of_seed_and_row(extract: Path, masking: Any) -> None:
    data = load_language(extract, tokenizer=masking, task="masked-lm", test_size=50)
    items = [data.train[i] for i in range(60)]
    batch, again = data.collate(items), data.collate(items)
    alone = data.collate(items[7:8])
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(alone["labels"][0], batch["labels"][7][: alone["labels"].shape[1]])
    chosen, real = batch["labels"] != -100, batch["attention_mask"] == 1
    originals = batch["input_ids"].clone()
    originals[chosen] = batch["labels"][chosen]
    want = torch.tensor([token for item in items for token in item["tokens"]])
    assert torch.equal(originals[real], want) and not bool((chosen & ~real).any())
    assert 0.13 < (chosen.sum() / real.sum()).item() < 0.17
    shares = [
        (batch["input_ids"][chosen] == masking.mask_token_id),
        batch["input_ids"][chosen] == batch["labels"][chosen],
    ]
    assert 0.7 < shares[0].float().mean().item() < 0.9 and 0.04 < shares[1].float().mean().item() < 0.18
    other = load_language(extract, tokenizer=masking, task="masked-lm", test_size=50, seed=0, mask_share=0.5)
    assert other.fingerprint != data.fingerprint


def test_what_a_language_model_cannot_learn_from(extract: Path, tmp_path: Path, tokenizer: Any, masking: Any) -> None:
    for options, message in [
        ({"task": "lm"}, "unknown task 'lm'"),
        ({"max_length": 1}, "max_length must be at least 2 tokens, got 1"),
        ({"mask_share": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"task": "masked-lm"}, "the tokenizer has no mask token"),
    ]:
        with pytest.raises(DataError, match=message):
            load_language(extract, tokenizer=tokenizer, **{"test_size": 50, **options})
    rows = [{"text": "games"}] * 3
    path = write(tmp_path / "short.jsonl", rows)
    with pytest.raises(DataError, match="the text 'games' has fewer than two tokens"):
        load_language(path, tokenizer=tokenizer, test_size=1)
    with pytest.raises(DataError, match="2 tokens do not fill one row of max_length=8"):
        load_language(path, tokenizer=tokenizer, test_size=1, max_length=8, pack=True)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"no padding token: set tokenizer\.pad_token"):
        load_language(path, tokenizer=tokenizer, test_size=1)


def test_bundles_say_their_task() -> None:
    items = [{"labels": torch.tensor([1, 2])}]
    assert DataBundle(items, items, stack, (), "tokens", task="causal-lm").describe()["task"] == "causal-lm"
    with pytest.raises(DataError, match="labels of a vocabulary, for causal-lm: leave class_names empty"):
        DataBundle(items, items, stack, ("a",), "tokens", task="causal-lm")
    with pytest.raises(DataError, match="unknown task 'ner'"):
        DataBundle(items, items, stack, ("a",), "tokens", task="ner")
    with pytest.raises(DataError, match="test_size=3 does not fit 'x': with 3 examples it must lie between 1 and 2"):
        random_split(3, 3, seed=0, name="x")
