"""A data set as pykd sees it: two splits of dicts, one way to make a batch of them, and an order that repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pykd.errors import DataError, nearest

#: What the labels of a data set stand for: one class a row, one a position, or tokens of a vocabulary.
TASKS = ("classification", "token-classification", "seq2seq-lm", "causal-lm", "masked-lm")
#: Those whose labels are classes with names.
NAMED = ("classification", "token-classification")

Item = dict[str, Any]
Batch = dict[str, Tensor]
Collate = Callable[[list[Item]], Batch]


@runtime_checkable
class MapDataset(Protocol):
    """What pykd needs of a split: a length, and a dict with ``labels`` for every index from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True)
class DataBundle:
    """A labelled data set with the held-out split that every stage is measured on.

    train, test: map-style data sets of dicts. collate: list of such dicts -> dict of tensors with ``labels`` (int64)
    and ``input_ids`` / ``attention_mask`` or ``pixel_values`` (float32, NCHW). class_names: one per label 0..classes-1;
    none where labels are tokens of a vocabulary. task: one of ``TASKS``; labels of every task but "classification" are
    (rows, positions), with -100 at positions that do not count.
    fingerprint: a digest of the content and of what is done to it; equal fingerprints mean equal batches.
    preprocessing: JSON-able facts for reports and saved models. tokenizer: of text data, else None.

    Raises DataError for an empty split, an unknown task, and class names that are missing, repeated or out of place.

    >>> items = [{"pixel_values": torch.zeros(1, 4, 4), "labels": i % 2} for i in range(4)]
    >>> bundle = DataBundle(train=items, test=items[:2], collate=stack, class_names=("even", "odd"), name="tiny")
    >>> bundle.example()["pixel_values"].shape
    torch.Size([1, 1, 4, 4])
    """

    train: MapDataset
    test: MapDataset
    collate: Collate
    class_names: Sequence[str]
    name: str
    fingerprint: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    task: str = "classification"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(nearest("task", self.task, TASKS))
        for split in ("train", "test"):
            if len(getattr(self, split)) == 0:
                raise DataError(f"the {split} split of {self.name!r} is empty; give it at least one labelled example")
        names = list(self.class_names)
        if self.task not in NAMED:
            if names:
                raise DataError(f"{self.name!r} has labels of a vocabulary, for {self.task}: leave class_names empty")
            return
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not names or repeated:
            found = f"{repeated[0]!r} twice" if repeated else "none"
            raise DataError(f"{self.name!r} needs one distinct name per class, but has {found}; check class_names")

    def example(self, size: int = 1) -> Batch:
        """A batch of the first ``size`` test examples, for tracing and for measuring latency."""
        return self.collate([self.test[index] for index in range(min(size, len(self.test)))])

    def describe(self) -> dict[str, Any]:
        """What a report says about the data: name, sizes, classes, preprocessing and fingerprint."""
        return {
            "name": self.name,
            "task": self.task,
            "train_size": len(self.train),
            "test_size": len(self.test),
            "class_names": list(self.class_names),
            "preprocessing": dict(self.preprocessing),
            "fingerprint": self.fingerprint,
        }


def batches(
    dataset: MapDataset,
    collate: Collate,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    start: int = 0,
) -> Iterator[Batch]:
    """Batches of one pass; the order is a function of (seed, epoch) alone, so an interrupted pass can go on anywhere.

    start: the first batch to yield, counted from 0; those before it are not even read. The last batch may be smaller.
    Raises ValueError for a batch size below 1.

    >>> items = [{"labels": i} for i in range(5)]
    >>> [b["labels"].tolist() for b in batches(items, stack, 2)]
    [[0, 1], [2, 3], [4]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = permutation(len(dataset), seed=seed, epoch=epoch) if shuffle else list(range(len(dataset)))

    def generate() -> Iterator[Batch]:
        for first in range(start * batch_size, len(order), batch_size):
            yield collate([dataset[index] for index in order[first : first + batch_size]])

    return generate()


def permutation(size: int, *, seed: int, epoch: int = 0) -> list[int]:
    """A shuffled 0..size-1, the same for the same (seed, epoch) on every machine."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def stack(items: list[Item]) -> Batch:
    """Collate items of equal shapes: tensors are stacked, whole numbers become int64, the rest is left out."""
    first = items[0]
    batch: Batch = {}
    for name, value in first.items():
        if isinstance(value, Tensor):
            batch[name] = torch.stack([item[name] for item in items])
        elif isinstance(value, int):
            batch[name] = torch.tensor([item[name] for item in items], dtype=torch.int64)
    return batch


def stratified_split(labels: Sequence[int], test_size: int, *, seed: int, name: str) -> tuple[list[int], list[int]]:
    """Indices of (train, test), both ascending: a seeded choice that holds out the same share of every class.

    Shares are rounded by largest remainders, and every class keeps at least one example to train on. Raises DataError
    when ``test_size`` makes that impossible.
    """
    groups: dict[int, list[int]] = {}
    for index in permutation(len(labels), seed=seed):
        groups.setdefault(labels[index], []).append(index)
    largest = len(labels) - len(groups)
    if not 1 <= test_size <= largest:
        raise DataError(
            f"test_size={test_size} does not fit {name!r}: with {len(labels)} examples in {len(groups)} classes it "
            f"must lie between 1 and {largest}, so that every class keeps one example to train on"
        )
    quotas = {label: test_size * (len(group) - 1) / largest for label, group in groups.items()}
    counts = {label: int(quota) for label, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda label: (counts[label] - quotas[label], label))
    for label in by_remainder[: test_size - sum(counts.values())]:
        counts[label] += 1
    test = [index for label in sorted(groups) for index in groups[label][: counts[label]]]
    held_out = set(test)
    return [index for index in range(len(labels)) if index not in held_out], sorted(test)


def random_split(size: int, test_size: int, *, seed: int, name: str) -> tuple[list[int], list[int]]:
    """Indices of (train, test), both ascending: a seeded choice. Raises DataError when either would be empty.

    >>> [len(part) for part in random_split(10, 3, seed=0, name="ten")]
    [7, 3]
    """
    if not 1 <= test_size < size:
        raise DataError(
            f"test_size={test_size} does not fit {name!r}: with {size} examples it must lie between 1 and {size - 1}"
        )
    order = permutation(size, seed=seed)
    return sorted(order[test_size:]), sorted(order[:test_size])


def digest(parts: Iterable[object]) -> str:
    """Fingerprint (sha256, first 16 hex digits) of a sequence of values, each hashed by its type and its length."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(f"{type(part).__name__}:{len(data)}:".encode() + data)
    return state.hexdigest()[:16]
