"""Losses over logits on the CPU, timed beside the memory traffic that they cannot avoid."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pykd

#: A leaf and its copy, the student's logits: they are no leaf, as a model returns them, and the gradients are the same.
Logits = tuple[Tensor, Tensor]
#: One call from logits to (loss, gradient).
Step = Callable[[Logits], tuple[Tensor, Tensor]]
#: Fresh logits, which are not timed, and the step that takes them.
Variant = tuple[Callable[[], Logits], Step]


def under_autograd(logits: Tensor) -> Logits:
    leaf = logits.detach().requires_grad_()
    return leaf, leaf.clone()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(benchmark: Any, variant: Variant, limit: Callable[[], Any], *, moved_bytes: int, rounds: int) -> None:
    """The step under pytest-benchmark; `extra_info` says how it stands to the limit."""
    prepare, step = variant
    benchmark.pedantic(step, setup=lambda: ((prepare(),), {}), rounds=rounds, warmup_rounds=1)
    median_s = benchmark.stats.stats.median
    limit_s = statistics.median(seconds(limit) for _ in range(rounds + 2))
    benchmark.extra_info.update(
        bandwidth_gb_s=moved_bytes / median_s / 1e9,
        times_the_limit=median_s / limit_s,
        isa=pykd.build_info()["isa"],
        threads=torch.get_num_threads(),
    )


def interleaved(limit: Callable[[], Any], variants: Sequence[Variant], rounds: int) -> list[list[float]]:
    """Seconds of the limit and of each variant, round by round; a first round does not count."""
    found = []
    for _ in range(rounds + 1):
        times = [seconds(limit)]
        for prepare, step in variants:
            logits = prepare()
            times.append(seconds(lambda step=step, logits=logits: step(logits)))  # type: ignore[misc]
        found.append(times)
    return found[1:]
