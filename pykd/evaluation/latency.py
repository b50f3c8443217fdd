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
class Speed:
    """Calls of ``batch_size`` rows, of ``length`` tokens or 0 for inputs without length; percentiles in ms a call."""

    batch_size: int
    length: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_s: float


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


def measure_speeds(
    model: nn.Module,
    batch: Mapping[str, Any],
    batch_sizes: Sequence[int],
    lengths: Sequence[int] = (),
    *,
    rounds: int = 20,
) -> tuple[Speed, ...]:
    """Latency and throughput at every batch size and length; rows and tokens of ``batch`` are repeated or cut to fit.

    lengths: tokens of a row, for inputs that have them; none: the length that the batch has. rounds: timed calls each.
    Raises ValueError for sizes below 1.

    >>> [(s.batch_size, s.length) for s in measure_speeds(nn.Linear(4, 2), {"x": torch.zeros(2, 4)}, [1, 8], rounds=3)]
    [(1, 0), (8, 0)]
    """
    if any(size < 1 for size in (*batch_sizes, *lengths)):
        raise ValueError(f"batch sizes and lengths must be at least 1, got {list(batch_sizes)} and {list(lengths)}")
    has_length = "input_ids" in batch
    found = []
    for length in lengths if lengths and has_length else [batch["input_ids"].shape[1] if has_length else 0]:
        for size in batch_sizes:
            timed = measure_latency(model, [_sized(batch, size, length)], rounds=rounds, warmup=2)
            found.append(Speed(size, length, timed.p50_ms, timed.p95_ms, timed.p99_ms, 1000 * size / timed.p50_ms))
    return tuple(found)


def _sized(batch: Mapping[str, Any], size: int, length: int) -> dict[str, Any]:
    """The tensors of a batch with ``size`` rows and, where they have one per token, ``length`` columns."""
    tokens = batch["input_ids"].shape[1] if length else None
    found = {}
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
            rows = tensor.repeat(-(-size // len(tensor)), *[1] * (tensor.dim() - 1))[:size]
            if tokens is not None and rows.dim() > 1 and rows.shape[1] == tokens:
                rows = rows.repeat(1, -(-length // tokens))[:, :length]
            found[name] = rows
    return found


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
