"""Pairs of texts for sequence-to-sequence models: translation, summaries, anything with a source and a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykd.data.bundle import Batch, DataBundle, Item, digest, random_split
from pykd.data.sources import load_tokenizer, preprocessing, tables, texts
from pykd.data.tokens import IGNORED
from pykd.errors import DataError


class Pairs:
    """One split: dicts of ``source`` and ``target`` (and the source again as ``text``, for reports)."""

    def __init__(self, sources: Sequence[str], targets: Sequence[str]) -> None:
        self.sources, self.targets = list(sources), list(targets)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Item:
        source = self.sources[index]
        return {"source": source, "target": self.targets[index], "text": source}


class TokenizePairs:
    """Collate: tokenize both sides, cut each at its length, pad; labels are the target's tokens, padding -100."""

    def __init__(self, tokenizer: Any, max_length: int, max_target_length: int, prefix: str) -> None:
        self.tokenizer, self.prefix = tokenizer, prefix
        self.max_length, self.max_target_length = max_length, max_target_length

    def __call__(self, items: list[Item]) -> Batch:
        import torch

        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        sources = [self.prefix + item["source"] for item in items]
        encoded = self.tokenizer(sources, max_length=self.max_length, **options)
        targets = self.tokenizer(
            text_target=[item["target"] for item in items], max_length=self.max_target_length, **options
        )
        batch = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
        return {**batch, "labels": targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)}


def load_pairs(
    source: str | Path,
    *,
    tokenizer: Any,
    source_column: str = "source",
    target_column: str = "target",
    prefix: str = "",
    max_length: int = 128,
    max_target_length: int = 128,
    test_source: str | Path | None = None,
    split_column: str | None = None,
    test_size: int = 1000,
    seed: int = 0,
    subset: str | None = None,
) -> DataBundle:
    """Source and target texts as a DataBundle for encoder-decoder models such as T5.

    prefix: put before every source ("translate English to German: "). max_length, max_target_length: tokens a source
    and a target are cut at, at least 2. The held-out rows and the other options are those of ``load_text``, without
    stratification. Raises DataError that names file, line and column of what is missing, empty or no text.

    Example::

        data = load_pairs("descriptions.parquet", tokenizer="t5-small", source_column="en", target_column="de")
    """
    for name, length in (("max_length", max_length), ("max_target_length", max_target_length)):
        if length < 2:
            raise DataError(f"{name} must be at least 2 tokens, got {length}")
    train, test, _ = tables(str(source), test_source, split_column, subset, target_column)
    splits = [
        (texts(table, source_column), texts(table, target_column)) for table in (train, test) if table is not None
    ]
    if test is None:
        sources, targets = splits.pop()
        for part in random_split(len(sources), test_size, seed=seed, name=train.source):
            splits.append(([sources[row] for row in part], [targets[row] for row in part]))
    tokenizer = load_tokenizer(tokenizer)  # last, because it may come from the hub
    facts = [prefix, max_length, max_target_length, len(tokenizer), type(tokenizer).__name__]
    return DataBundle(
        train=Pairs(*splits[0]),
        test=Pairs(*splits[1]),
        collate=TokenizePairs(tokenizer, max_length, max_target_length, prefix),
        class_names=(),
        name=Path(source).name,
        fingerprint=digest([*facts, *(part for split in splits for part in split)]),
        preprocessing=preprocessing(
            source, tokenizer, prefix=prefix, max_length=max_length, max_target_length=max_target_length, seed=seed
        ),
        tokenizer=tokenizer,
        task="seq2seq-lm",
    )
