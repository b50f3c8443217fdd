"""Concurrent inputs are computed together, and only those that still have someone waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykd.serve.batching import CALL_COST_TOKENS, Batcher, QueueFullError, companions


@dataclass(frozen=True)
class Item:
    length: int
    name: str = ""


class Doubler:
    """Computes the double of lengths; remembers its batches and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, items: list[Item]) -> list[int]:
        self.batches.append([item.length for item in items])
        self.free.wait(5)
        if any(item.name == "bad" for item in items):
            raise RuntimeError("a bad item")
        return [2 * item.length for item in items]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def batcher(compute: Doubler, executor: ThreadPoolExecutor, **options: Any) -> Batcher[Item, int]:
    return Batcher(compute, executor, **{"max_batch": 4, "window_s": 0.0, "max_queue": 8, **options})


def together(each: Batcher[Item, int], lengths: Sequence[int]) -> list[list[int]]:
    """The answers to requests of one item each, all at once."""

    async def ask() -> list[list[int]]:
        return list(await asyncio.gather(*(each.submit([Item(length)]) for length in lengths)))

    return asyncio.run(ask())


def test_everyone_gets_their_own_answer(executor: ThreadPoolExecutor) -> None:
    compute = Doubler()
    assert together(batcher(compute, executor), [5, 3, 4]) == [[10], [6], [8]]
    assert together(batcher(compute, executor), []) == []


def test_what_arrives_within_the_window_is_one_batch_and_a_full_one_does_not_wait(executor: ThreadPoolExecutor) -> None:
    compute = Doubler()
    patient = batcher(compute, executor, window_s=30.0)
    assert together(patient, [5, 6, 7, 8]) == [[10], [12], [14], [16]]  # would take 30 s if it waited
    assert compute.batches == [[5, 6, 7, 8]]
    compute.batches.clear()
    short = batcher(compute, executor, window_s=0.05)
    together(short, [1, 2])
    assert compute.batches == [[1, 2]]


def test_what_arrives_while_a_batch_is_computed_is_the_next_one(executor: ThreadPoolExecutor) -> None:
    compute, seen = Doubler(), []

    async def scenario() -> None:
        busy = batcher(compute, executor, on_batch=lambda items, seconds: seen.append(items))
        compute.free.clear()
        first = asyncio.create_task(busy.submit([Item(1)]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(busy.submit([Item(length)])) for length in (20, 90, 21, 22)]
        await asyncio.sleep(0.05)
        assert busy.waiting == 4
        compute.free.set()
        assert await first == [2] and await asyncio.gather(*others) == [[40], [180], [42], [44]]

    asyncio.run(scenario())
    assert compute.batches == [[1], [20, 21, 22], [90]] and seen == [1, 3, 1]


def test_several_batches_are_computed_at_once_and_share_what_waits() -> None:
    compute = Doubler()

    async def scenario(busy: Batcher[Item, int]) -> None:
        compute.free.clear()
        first, second = (asyncio.create_task(busy.submit([Item(length)])) for length in (1, 2))
        await asyncio.sleep(0.05)
        third = asyncio.create_task(busy.submit([Item(3)]))
        await asyncio.sleep(0.05)
        assert sorted(compute.batches) == [[1], [2]] and busy.waiting == 1
        compute.free.set()
        assert await asyncio.gather(first, second, third) == [[2], [4], [6]]
        assert await busy.submit([Item(length) for length in (5, 6, 7)]) == [10, 12, 14]

    with ThreadPoolExecutor(2) as threads:
        asyncio.run(scenario(batcher(compute, threads, parallel=2)))
    assert sorted(compute.batches) == [[1], [2], [3], [5, 6], [7]]


def test_those_that_have_gone_are_not_computed(executor: ThreadPoolExecutor) -> None:
    compute = Doubler()

    async def scenario() -> None:
        busy = batcher(compute, executor)
        compute.free.clear()
        first = asyncio.create_task(busy.submit([Item(1)]))
        await asyncio.sleep(0.05)
        gone, stays = (asyncio.create_task(busy.submit([Item(length)])) for length in (7, 8))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        compute.free.set()
        assert await first == [2] and await stays == [16]

    asyncio.run(scenario())
    assert compute.batches == [[1], [8]]


def test_a_full_queue_says_when_to_come_again(executor: ThreadPoolExecutor) -> None:
    compute = Doubler()

    async def scenario() -> None:
        busy = batcher(compute, executor, max_queue=3)
        compute.free.clear()
        first = asyncio.create_task(busy.submit([Item(1)]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(busy.submit([Item(2), Item(3)]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="too many inputs are waiting: try again in 1 s") as refused:
            await busy.submit([Item(4), Item(5)])
        assert refused.value.retry_after_s == 1
        compute.free.set()
        assert await first == [2] and await second == [4, 6]
        assert await busy.submit([Item(4), Item(5)]) == [8, 10]

    asyncio.run(scenario())


def test_an_error_reaches_the_batch_and_nobody_after_it(executor: ThreadPoolExecutor) -> None:
    async def scenario() -> None:
        each = batcher(Doubler(), executor)
        with pytest.raises(RuntimeError, match="a bad item"):
            await each.submit([Item(1), Item(2, "bad")])
        assert await each.submit([Item(3)]) == [6]

    asyncio.run(scenario())


@given(st.lists(st.integers(1, 512), min_size=1, max_size=40), st.integers(1, 16))
def test_companions_cost_less_together(lengths: list[int], most: int) -> None:
    chosen = companions(lengths, most)
    assert chosen[0] == 0 and len(chosen) <= most and sorted(set(chosen)) == chosen
    picked = [lengths[position] for position in chosen]
    together = CALL_COST_TOKENS + len(picked) * max(picked)
    assert together <= sum(CALL_COST_TOKENS + length for length in picked)


def test_companions_of_none_are_none() -> None:
    assert companions([], 4) == []
