"""What the parts of the service share: its models, its metrics, who watches, and whether it is being stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fastapi import HTTPException

from pykd.serve.metrics import Metrics
from pykd.serve.predictors import Answer
from pykd.serve.served import Served
from pykd.serve.settings import Settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answered:
    """One request that was answered, as observers are told of it; everything by input, in their order.

    inputs: the texts, or the bytes of the images. ids: of the predictions, as the client was told them. lengths: in
    tokens, 1 for images. answers: with class probabilities from models that classify whole inputs. latency_ms: of the
    request, from its arrival.
    """

    model_name: str
    inputs: Sequence[Any]
    ids: Sequence[str]
    lengths: Sequence[int]
    answers: Sequence[Answer]
    latency_ms: float


#: What monitoring is: it is told of every request that was answered, and must return quickly.
Observer = Callable[[Answered], None]


@dataclass
class State:
    """One service. `models` by name; `public`: paths that need no token; `observers`: see :class:`Observer`."""

    settings: Settings
    models: dict[str, Served] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    observers: list[Observer] = field(default_factory=list)
    public: set[str] = field(default_factory=lambda: {"/healthz"})
    in_flight: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    stop_by: float = float("inf")
    #: Where inputs are made ready, where models compute, and where models are checked.
    prepare: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "pykd-prepare"))
    compute: ThreadPoolExecutor = field(init=False)
    checks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "pykd-check"))
    checking: bool = False
    #: What the parts want done at the end, the last first.
    closing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        parallel = self.settings.parallel
        threads = max(1, (self.settings.threads or torch.get_num_threads()) // parallel)
        chosen = parallel > 1 or self.settings.threads is not None
        # OpenMP counts for each thread, MKL for the process.
        begin = (torch.set_num_threads, (threads,)) if chosen else (None, ())
        self.compute = ThreadPoolExecutor(parallel, "pykd-compute", *begin)

    def stop(self) -> None:
        """Answer what is under way, refuse what comes now. Long answers end when they see `stopping`."""
        self.stop_by = time.monotonic() + self.settings.drain_s
        self.stopping.set()

    @property
    def stopped(self) -> bool:
        """Whether nothing is left to be answered, or the time for it is over."""
        return self.stopping.is_set() and (self.in_flight == 0 or time.monotonic() >= self.stop_by)

    def close(self) -> None:
        """Let the parts and the threads end."""
        while self.closing:
            self.closing.pop()()
        for threads in (self.prepare, self.compute, self.checks):
            threads.shutdown(wait=False, cancel_futures=True)

    def observe(self, answered: Answered) -> None:
        """Tell every observer; one that fails is logged and counted, and spoils no answer."""
        for observer in self.observers:
            try:
                observer(answered)
            except Exception:
                self.metrics.observer_failures.inc()
                logger.exception("an observer of predictions failed")


async def within(seconds: float, work: Awaitable[Result], what: str) -> Result:
    """The result of ``work``, or the answer 504 when it takes longer."""
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise HTTPException(504, f"{what} took longer than {seconds:g} s") from None
