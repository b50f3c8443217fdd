"""Continued learning: new data, and a share of the old so that it is not forgotten."""

from __future__ import annotations

import dataclasses

from pykd.data.bundle import DataBundle, Item, MapDataset, digest, permutation
from pykd.errors import DataError


class Joined:
    """A training set, and rows of another after it."""

    def __init__(self, new: MapDataset, old: MapDataset, rows: list[int]) -> None:
        self.new, self.old, self.rows = new, old, rows

    def __len__(self) -> int:
        return len(self.new) + len(self.rows)

    def __getitem__(self, index: int, /) -> Item:
        if index < len(self.new):
            return self.new[index]
        return self.old[self.rows[index - len(self.new)]]


def with_replay(data: DataBundle, old: DataBundle, *, share: float = 0.1, seed: int = 0) -> DataBundle:
    """The new data with ``share`` (0..1] of the old training set among its own (experience replay, Robins 1995).

    Which rows are replayed is a function of ``seed``; they are mixed in by the order of the training. What is held out
    stays that of ``data``. Raises DataError for a share out of range and for data of another task, other classes or
    another tokenizer, whose rows cannot stand in one batch.

    >>> import torch
    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.zeros(2), "labels": 0}] * 10
    >>> new, old = (DataBundle(items, items, stack, ["a", "b"], name) for name in ("new", "old"))
    >>> len(with_replay(new, old, share=0.5).train)
    15
    """
    if not 0 < share <= 1:
        raise DataError(f"share is the part of the old data that is replayed, above 0 and at most 1, got {share}")
    for what, mine, its in (
        ("task", data.task, old.task),
        ("class names", list(data.class_names), list(old.class_names)),
        ("tokenizer", _vocabulary(data), _vocabulary(old)),
    ):
        if mine != its:
            raise DataError(f"{old.name!r} cannot be replayed with {data.name!r}: its {what} is {its}, not {mine}")
    rows = sorted(permutation(len(old.train), seed=seed)[: max(1, round(share * len(old.train)))])
    return dataclasses.replace(
        data,
        train=Joined(data.train, old.train, rows),
        fingerprint=digest([data.fingerprint, old.fingerprint, rows]),
        preprocessing={**data.preprocessing, "replay": {"name": old.name, "share": share, "seed": seed}},
    )


def _vocabulary(data: DataBundle) -> str:
    """A short name of what the data's tokenizer makes of texts."""
    if data.tokenizer is None:
        return "none"
    tokens = sorted(data.tokenizer.get_vocab().items())
    return f"{type(data.tokenizer).__name__} of {len(tokens)} tokens ({digest([tokens])})"
