"""Bundles are checked when made; the order of batches is a function of (seed, epoch); splits keep every class."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.data.bundle import DataBundle, MapDataset, batches, digest, permutation, stack, stratified_split
from pykd.errors import DataError

ITEMS = [{"pixel_values": torch.full((1, 2, 2), float(i)), "labels": i % 3, "text": "left out"} for i in range(10)]


def bundle(**changes: object) -> DataBundle:
    settings = {"train": ITEMS, "test": ITEMS[:4], "collate": stack, "class_names": ("a", "b", "c"), "name": "tiny"}
    return DataBundle(**{**settings, **changes})  # type: ignore[arg-type]


def test_example_is_a_batch_of_the_first_test_items() -> None:
    batch = bundle().example(3)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["labels"].dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 1, 2, 2)
    assert set(batch) == {"labels", "pixel_values"}
    assert len(bundle().example(99)["labels"]) == 4


def test_a_list_of_dicts_is_a_dataset() -> None:
    assert isinstance(ITEMS, MapDataset)


def test_describe_is_plain() -> None:
    assert bundle().describe()["test_size"] == 4
    assert bundle(fingerprint="x").describe()["fingerprint"] == "x"


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_is_refused(split: str) -> None:
    with pytest.raises(DataError, match=f"the {split} split of 'tiny' is empty"):
        bundle(**{split: []})


def test_class_names_must_be_there_and_distinct() -> None:
    with pytest.raises(DataError, match="has 'a' twice"):
        bundle(class_names=("a", "b", "a"))
    with pytest.raises(DataError, match="has none"):
        bundle(class_names=())


def test_every_item_comes_once_in_an_order_that_repeats() -> None:
    def order(**options: object) -> list[int]:
        return [
            int(v) for b in batches(ITEMS, stack, 3, shuffle=True, **options) for v in b["pixel_values"][:, 0, 0, 0]
        ]  # type: ignore[arg-type]

    assert sorted(order(seed=1)) == list(range(10))
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    assert order(seed=1, epoch=2, start=2) == order(seed=1, epoch=2)[6:]


def test_without_shuffle_the_order_is_the_data_sets() -> None:
    assert [len(b["labels"]) for b in batches(ITEMS, stack, 4)] == [4, 4, 2]
    assert torch.cat([b["labels"] for b in batches(ITEMS, stack, 4)]).tolist() == [i % 3 for i in range(10)]


def test_shuffling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(batches(ITEMS, stack, 4, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_size_below_one_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches(ITEMS, stack, 0)


def test_the_order_is_a_promise() -> None:
    assert permutation(8, seed=0) == [5, 1, 4, 2, 3, 7, 6, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.integers(0, 5), st.data())
def test_a_split_parts_the_data_and_leaves_every_class_something_to_learn(
    labels: list[int], seed: int, data: st.DataObject
) -> None:
    largest = len(labels) - len(set(labels))
    if largest == 0:
        with pytest.raises(DataError, match="does not fit 'x'"):
            stratified_split(labels, 1, seed=seed, name="x")
        return
    test_size = data.draw(st.integers(1, largest))
    train, test = stratified_split(labels, test_size, seed=seed, name="x")
    assert len(test) == test_size
    assert sorted(train + test) == list(range(len(labels)))
    assert {labels[i] for i in train} == set(labels)


def test_a_split_is_stratified() -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 10
    _, test = stratified_split(labels, 32, seed=3, name="x")
    assert Counter(labels[i] for i in test) == {0: 20, 1: 10, 2: 2}


@pytest.mark.parametrize("test_size", [0, -1, 8])
def test_a_split_that_cannot_be_is_refused(test_size: int) -> None:
    with pytest.raises(DataError, match=rf"test_size={test_size} does not fit 'x': with 10 .* between 1 and 7"):
        stratified_split([i % 3 for i in range(10)], test_size, seed=0, name="x")


def test_a_digest_tells_apart_what_joins_to_the_same_string() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["1"]) != digest([1])
    assert digest([b"x", 2]) == digest([b"x", 2])
