"""Labelled texts for sequence classification: a local file or a `datasets` name, and any Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykd.data.bundle import Batch, DataBundle, Item, digest, stratified_split
from pykd.data.labels import class_names as names_of
from pykd.data.labels import encode
from pykd.data.sources import load_tokenizer, preprocessing, tables
from pykd.data.sources import texts as texts_of
from pykd.errors import DataError


class Texts:
    """One split: dicts of ``text`` and ``labels``."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.texts, self.labels = list(texts), list(labels)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Item:
        return {"text": self.texts[index], "labels": self.labels[index]}


class Tokenize:
    """Collate: tokenize the texts of a batch, cut at ``max_length`` tokens, pad to the longest of the batch."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, items: list[Item]) -> Batch:
        import torch

        texts = [item["text"] for item in items]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        batch = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
        return {**batch, "labels": torch.tensor([item["labels"] for item in items], dtype=torch.int64)}


def load_text(
    source: str | Path,
    *,
    tokenizer: Any,
    text_column: str = "text",
    label_column: str = "label",
    max_length: int = 128,
    test_source: str | Path | None = None,
    split_column: str | None = None,
    test_size: int = 1000,
    seed: int = 0,
    subset: str | None = None,
    class_names: Sequence[str] | None = None,
) -> DataBundle:
    """Labelled texts as a DataBundle: a local .csv, .tsv, .jsonl or .parquet file, or anything `datasets` can load.

    tokenizer: a Hugging Face tokenizer, or its name or folder. Labels may be strings or whole numbers; their sorted
    distinct values become the class names unless ``class_names`` (or a ClassLabel column) gives them, and then
    whole-number labels are positions in that list. max_length: tokens, at least 2.

    Held out are, in this order: the file ``test_source``; the rows whose ``split_column`` says `test` (all others must
    say `train`); the labelled `test` or `validation` split of a data set; else ``test_size`` rows, stratified by class
    and chosen by ``seed``. subset: configuration of a data set on the hub.

    Raises DataError that names the file, the line, the column and the value: for files and columns that do not exist,
    lines that cannot be read, empty texts, labels that are missing, mixed, out of range or unknown, and empty splits.

    Example::

        data = load_text("reviews.csv", tokenizer="distilbert-base-uncased", label_column="stars", test_size=500)
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    train, test, names = tables(str(source), test_source, split_column, subset, label_column)
    names = list(class_names) if class_names is not None else names
    numbered = names is not None
    names = names or names_of(train, label_column)
    splits = []
    for table in (train, test):
        if table is not None:
            splits.append((texts_of(table, text_column), encode(table, label_column, names, numbered=numbered)))
    if test is None:
        (texts, labels), rows = splits.pop(), None
        for rows in stratified_split(labels, test_size, seed=seed, name=train.source):
            splits.append(([texts[row] for row in rows], [labels[row] for row in rows]))
    tokenizer = load_tokenizer(tokenizer)  # last, because it may come from the hub
    content = [part for texts, labels in splits for part in (*texts, labels)]
    facts = [names, max_length, len(tokenizer), type(tokenizer).__name__]
    return DataBundle(
        train=Texts(*splits[0]),
        test=Texts(*splits[1]),
        collate=Tokenize(tokenizer, max_length),
        class_names=tuple(names),
        name=Path(source).name,
        fingerprint=digest([*facts, *content]),
        preprocessing=preprocessing(source, tokenizer, max_length=max_length, seed=seed),
        tokenizer=tokenizer,
    )
