"""Labelled words for token classification: a local file or a `datasets` name, and any fast Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykd.data.bundle import Batch, DataBundle, Item, digest, random_split
from pykd.data.sources import load_tokenizer, preprocessing, tables
from pykd.data.tables import Table
from pykd.errors import DataError, nearest

#: Label of positions that count nowhere.
IGNORED = -100


class TaggedWords:
    """One split: dicts of ``words``, one of ``labels`` for each, and the ``text`` they make."""

    def __init__(self, words: Sequence[list[str]], labels: Sequence[list[int]]) -> None:
        self.words, self.labels = list(words), list(labels)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> Item:
        words = self.words[index]
        return {"words": words, "labels": self.labels[index], "text": " ".join(words)}


class AlignTags:
    """Collate: words to tokens, cut at ``max_length``, padded; the first token of a word carries its label.

    Its other tokens, special tokens and padding have label -100 (Devlin et al. 2019, section 5.3).
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, items: list[Item]) -> Batch:
        import torch

        encoded = self.tokenizer(
            [item["words"] for item in items], is_split_into_words=True, padding=True, truncation=True,
            max_length=self.max_length, return_tensors="pt",
        )  # fmt: skip
        batch = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
        labels = [aligned(encoded.word_ids(row), item["labels"]) for row, item in enumerate(items)]
        return {**batch, "labels": torch.tensor(labels, dtype=torch.int64)}


def aligned(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Labels of tokens from those of words: the first token of each word has its word's, the others -100.

    >>> aligned([None, 0, 0, 1, None], [7, 8])
    [-100, 7, -100, 8, -100]
    """
    before = [None, *word_ids[:-1]]
    return [
        IGNORED if word is None or word == last else labels[word] for word, last in zip(word_ids, before, strict=True)
    ]


def load_tokens(
    source: str | Path,
    *,
    tokenizer: Any,
    words_column: str = "tokens",
    labels_column: str = "tags",
    max_length: int = 128,
    test_source: str | Path | None = None,
    split_column: str | None = None,
    test_size: int = 1000,
    seed: int = 0,
    subset: str | None = None,
    class_names: Sequence[str] | None = None,
) -> DataBundle:
    """Words with a label each (named entities, parts of speech) as a DataBundle for token classification.

    Each row holds a list of words and one of labels, or both as text with blanks between. Labels are strings ("O",
    "B-PER", "I-PER" ...), whose sorted distinct values become the class names unless ``class_names`` (or a ClassLabel
    column) gives them, or whole numbers, which are positions in that list. tokenizer: a fast one, which knows the word
    of every token. The held-out rows and the other options are those of ``load_text``, without stratification.

    Raises DataError that names file, line and value: rows without words, words without label, unknown labels.

    Example::

        data = load_tokens("entities.jsonl", tokenizer="distilbert-base-cased", labels_column="ner_tags")
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    train, test, found = tables(str(source), test_source, split_column, subset, labels_column)
    both = [train] if test is None else [train, test]
    rows = [_rows(table, words_column, labels_column) for table in both]
    names = list(class_names) if class_names is not None else found or _names(rows[0], train, labels_column)
    splits = [(words, _encode(labels, table, names)) for (words, labels), table in zip(rows, both, strict=True)]
    if test is None:
        words, numbers = splits.pop()
        for part in random_split(len(words), test_size, seed=seed, name=train.source):
            splits.append(([words[row] for row in part], [numbers[row] for row in part]))
    tokenizer = load_tokenizer(tokenizer)  # last, because it may come from the hub
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} does not know which word a token is from; use a fast tokenizer")
    facts = [names, max_length, len(tokenizer), type(tokenizer).__name__]
    return DataBundle(
        train=TaggedWords(*splits[0]),
        test=TaggedWords(*splits[1]),
        collate=AlignTags(tokenizer, max_length),
        class_names=tuple(names),
        name=Path(source).name,
        fingerprint=digest([*facts, *(part for split in splits for part in split)]),
        preprocessing=preprocessing(source, tokenizer, max_length=max_length, seed=seed),
        tokenizer=tokenizer,
        task="token-classification",
    )


def _rows(table: Table, words_column: str, labels_column: str) -> tuple[list[list[str]], list[list[str | int]]]:
    """Words and labels of every row, of equal length in each."""
    all_words, all_labels = [], []
    for row, cells in enumerate(zip(table.column(words_column), table.column(labels_column), strict=True)):
        words, labels = (cell.split() if isinstance(cell, str) else cell for cell in cells)
        where = f"{table.source}, {table.place(row)}"
        for column, cell in ((words_column, words), (labels_column, labels)):
            if not isinstance(cell, (list, tuple)) or not cell:
                raise DataError(f"{where}: column {column!r} must hold a list, got {cell!r}; fill or delete the row")
        if len(words) != len(labels):
            raise DataError(f"{where}: {len(words)} words but {len(labels)} labels; give every word one")
        wrong = next((word for word in words if not isinstance(word, str) or not word.strip()), None)
        if wrong is not None:
            raise DataError(f"{where}: {wrong!r} is no word; delete it with its label")
        all_words.append(list(words))
        all_labels.append(list(labels))
    return all_words, all_labels


def _names(rows: tuple[list[list[str]], list[list[str | int]]], table: Table, labels_column: str) -> list[str]:
    found = {label for labels in rows[1] for label in labels}
    numbers = [label for label in found if not isinstance(label, str)]
    if numbers:
        raise DataError(
            f"{table.source}: column {labels_column!r} holds numbers such as {numbers[0]!r}; pass class_names, "
            "the names of the classes in their order"
        )
    if len(found) < 2:
        raise DataError(f"{table.source}: column {labels_column!r} holds one single label; a tagger needs two")
    return sorted(str(label) for label in found)


def _encode(rows: list[list[str | int]], table: Table, names: Sequence[str]) -> list[list[int]]:
    index: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    index |= {number: number for number in range(len(names))}
    encoded = []
    for row, labels in enumerate(rows):
        wrong = next((label for label in labels if label not in index), None)
        if wrong is not None:
            raise DataError(f"{table.source}, {table.place(row)}: {nearest('label', str(wrong), names)}")
        encoded.append([index[label] for label in labels])
    return encoded
