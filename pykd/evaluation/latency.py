"""How fast a model answers: percentiles at batch 1, throughput, and fair ratios from alternating rounds."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pykd.models.adapter import logits, move


@dataclass(frozen=True)
class Latency:
    """Percentiles of the time of one call, in milliseconds, over ``rounds`` calls."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    rounds: int


@dataclass(frozen=True)
class Interleaved:
    """Times of models that took turns: rounds_ms[name] has one median per round, in milliseconds.

    ``timed["student"]`` is the median over rounds, ``timed.speedup("student")`` how many times faster it is than the
    baseline.
    """

    rounds_ms: dict[str, list[float]]
    baseline: str

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.rounds_ms[name])

    def speedup(self, name: str, *, baseline: str | None = None) -> float:
        """Median over rounds of (time of the baseline / time of the model): above 1 is faster."""
        pairs = zip(self.rounds_ms[baseline or self.baseline], self.rounds_ms[name], strict=True)
        return statistics.median(before / now for before, now in pairs)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; the CPU when it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def measure_latency(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, rounds: int, warmup: int = 5) -> Latency:
    """Time ``rounds`` calls, going round the batches; the first ``warmup`` calls are not counted.

    The clock is read when the device has finished. Raises ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = device_of(model)
    ready = [move(batch, device) for batch in batches]
    with evaluating(model):
        times = [_call_ms(model, ready[index % len(ready)], device) for index in range(warmup + rounds)][warmup:]
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
    p50, p95, p99 = quantiles.tolist()
    return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, rounds=rounds)


def measure_throughput(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, seconds: float = 1.0, at_least: int = 3
) -> float:
    """Examples per second: rows of the batches divided by the median time of a call, after one call to warm up.

    Runs ``at_least`` calls, and more until ``seconds`` have passed.
    """
    device = device_of(model)
    ready = [move(batch, device) for batch in batches]
    rows = [len(batch["labels"]) for batch in ready]
    rates: list[float] = []
    with evaluating(model):
        _call_ms(model, ready[0], device)
        end = time.perf_counter() + seconds
        while len(rates) < at_least or time.perf_counter() < end:
            index = len(rates) % len(ready)
            rates.append(1000 * rows[index] / _call_ms(model, ready[index], device))
    return statistics.median(rates)


def interleaved_latency(
    models: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    rounds: int = 20,
    *,
    calls: int = 5,
    warmup: int = 3,
) -> Interleaved:
    """Time models in alternating rounds, so that what else the machine does falls on all of them alike.

    In each round every model answers ``calls`` times and the median counts; the order turns by one every round. The
    first name is the baseline of the ratios. Times in milliseconds. Raises ValueError for no models or rounds below 1.

    >>> models = {"wide": nn.Linear(2048, 2048), "narrow": nn.Linear(2048, 8)}
    >>> interleaved_latency(models, {"x": torch.randn(1, 2048)}).speedup("narrow") > 1
    True
    """
    if not models or rounds < 1:
        raise ValueError(f"interleaved_latency needs models and at least 1 round, got {len(models)} and {rounds}")
    names = list(models)
    ready = {name: (models[name], move(batch, device_of(models[name])), device_of(models[name])) for name in names}
    measured: dict[str, list[float]] = {name: [] for name in names}
    with evaluating(*models.values()):
        for name in names:
            for _ in range(warmup):
                _call_ms(*ready[name])
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                measured[name].append(statistics.median(_call_ms(*ready[name]) for _ in range(calls)))
    return Interleaved(measured, names[0])


def _call_ms(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter_ns()
    logits(model, batch)
    _synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
