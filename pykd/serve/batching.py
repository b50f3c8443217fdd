"""Dynamic batching: inputs of concurrent requests are computed together where that is cheaper than one by one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

#: What one call of a model costs beside its tokens, in tokens: an input joins others when padding costs less than that.
CALL_COST_TOKENS = 32
#: Weight of the newest batch in the running mean of the time that one input takes.
RECENT = 0.1


class Sized(Protocol):
    """An input that has a length: tokens, or 1 where all inputs are alike."""

    @property
    def length(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")


class QueueFullError(Exception):
    """More inputs wait than are allowed; `retry_after_s` says when there will be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many inputs are waiting: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    answer: asyncio.Future[Result]
    arrived: float


class Batcher(Generic[Item, Result]):
    """Collects items for ``compute``, which runs in ``executor`` and answers a list in its order.

    The item that has waited longest always goes next, with others of about its length: see :func:`companions`. It
    waits up to ``window_s`` for company, and less when ``max_batch`` items are there. ``parallel`` batches are computed
    at once, in as many threads of the executor; those that have nothing to do share what waits. ``on_batch(items,
    seconds)`` is told of every batch. Items whose request has gone are not computed.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], list[Result]],
        executor: Executor,
        *,
        max_batch: int,
        window_s: float,
        max_queue: int,
        parallel: int = 1,
        on_batch: Callable[[int, float], None] = lambda items, seconds: None,
    ) -> None:
        self._compute, self._executor, self._on_batch = compute, executor, on_batch
        self._max_batch, self._window_s, self._max_queue, self._parallel = max_batch, window_s, max_queue, parallel
        self._queue: list[_Waiting[Item, Result]] = []
        self._coming = 0
        self._full: asyncio.Event | None = None
        self._workers: set[asyncio.Task[None]] = set()
        self._computing = 0
        self._item_s = 0.0

    @property
    def waiting(self) -> int:
        """Items that are not being computed yet, those that are being made ready among them."""
        return len(self._queue) + self._coming

    @contextlib.contextmanager
    def coming(self, items: int) -> Iterator[None]:
        """Keep places for items while they are made ready. Raises QueueFullError where so many more may not wait."""
        self._require_room(items)
        self._coming += items
        try:
            yield
        finally:
            self._coming -= items

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Answers to ``items``. Raises QueueFullError where the queue has no room, and what ``compute`` raises."""
        self._require_room(len(items))
        loop, now = asyncio.get_running_loop(), time.monotonic()
        fresh = [_Waiting[Item, Result](item, loop.create_future(), now) for item in items]
        self._queue += fresh
        self._workers = {worker for worker in self._workers if not worker.done()}
        idle = self._parallel - len(self._workers)
        self._workers |= {loop.create_task(self._work()) for _ in range(min(idle, len(self._queue)))}
        if self._full is not None and len(self._queue) >= self._max_batch:
            self._full.set()
        return list(await asyncio.gather(*(one.answer for one in fresh)))

    def _require_room(self, items: int) -> None:
        if self.waiting + items > self._max_queue:
            raise QueueFullError(max(1, math.ceil(self.waiting * self._item_s / self._parallel)))

    async def _work(self) -> None:
        """Batch after batch, until nothing waits."""
        while self._queue:
            await self._company()
            batch = self._next()
            if batch:
                await self._run(batch)

    async def _company(self) -> None:
        """Wait until the first item has waited long enough, or a batch is full."""
        left = self._queue[0].arrived + self._window_s - time.monotonic()
        if left <= 0 or len(self._queue) >= self._max_batch:
            return
        self._full = full = self._full or asyncio.Event()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(full.wait(), left)
        if self._full is full:
            self._full = None

    def _next(self) -> list[_Waiting[Item, Result]]:
        live = [one for one in self._queue if not one.answer.done()]
        idle = self._parallel - self._computing
        chosen = companions([one.item.length for one in live], min(self._max_batch, math.ceil(len(live) / idle)))
        batch = [live[position] for position in chosen]
        self._queue = [one for one in live if one not in batch]
        return batch

    async def _run(self, batch: list[_Waiting[Item, Result]]) -> None:
        loop, started = asyncio.get_running_loop(), time.monotonic()
        self._computing += 1
        try:
            results = await loop.run_in_executor(self._executor, self._compute, [one.item for one in batch])
        except Exception as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        finally:
            self._computing -= 1
        seconds = time.monotonic() - started
        self._item_s += RECENT * (seconds / len(batch) - self._item_s)
        self._on_batch(len(batch), seconds)
        for one, result in zip(batch, results, strict=True):
            if not one.answer.done():
                one.answer.set_result(result)


def companions(lengths: Sequence[int], most: int) -> list[int]:
    """Positions computed together with the first: as many, in their order, as cost less together than each alone.

    A batch costs CALL_COST_TOKENS + rows * longest; one joins when the padding that this adds costs less than a call.

    >>> companions([20, 120, 24, 18, 22], 3)
    [0, 2, 3]
    """
    chosen = [0] if lengths else []
    longest = lengths[0] if lengths else 0
    for position in range(1, len(lengths)):
        if len(chosen) == most:
            break
        wider = max(longest, lengths[position])
        padding = (len(chosen) + 1) * wider - len(chosen) * longest - lengths[position]
        if padding <= CALL_COST_TOKENS:
            chosen.append(position)
            longest = wider
    return chosen
