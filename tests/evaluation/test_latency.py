"""Clocks: percentiles are ordered, warm-up is not counted, models take turns, nothing about the model changes."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from torch import Tensor, nn

from pykd.evaluation.latency import (
    Interleaved,
    device_of,
    evaluating,
    interleaved_latency,
    measure_latency,
    measure_throughput,
)

BATCH = {"x": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}


class Timed(nn.Module):
    """Answers after the times it was given, in turn, and notes that it was called."""

    def __init__(self, *milliseconds: float, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.milliseconds, self.calls, self.log, self.name = milliseconds, 0, log, name
        self.grad_modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.milliseconds[min(self.calls, len(self.milliseconds) - 1)] / 1000)
        self.calls += 1
        self.grad_modes.add(torch.is_grad_enabled())
        if self.log is not None:
            self.log.append(self.name)
        return x


def test_the_warm_up_is_not_counted() -> None:
    model = Timed(100, 100, 1)
    latency = measure_latency(model, [BATCH], rounds=10, warmup=2)
    assert model.calls == 12 and latency.rounds == 10
    assert 1 <= latency.p50_ms <= latency.p95_ms <= latency.p99_ms < 100


def test_percentiles_see_the_slow_calls() -> None:
    latency = measure_latency(Timed(*([1] * 18), 60, 60), [BATCH], rounds=20, warmup=0)
    assert latency.p50_ms < 30 < 60 <= latency.p95_ms


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure_latency(Timed(0), [BATCH], rounds=0)


def test_throughput_is_rows_by_time() -> None:
    rate = measure_throughput(Timed(10), [BATCH], seconds=0.05)
    assert 50 < rate <= 200


def test_models_take_turns_and_the_order_turns() -> None:
    log: list[str] = []
    models = {name: Timed(0.1, log=log, name=name) for name in ("a", "b", "c")}
    interleaved_latency(models, BATCH, rounds=3, calls=1, warmup=1)
    assert log == [*"abc", *"abc", *"bca", *"cab"]


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    timed = Interleaved({"teacher": [10.0, 40.0, 12.0], "student": [5.0, 10.0, 4.0]}, "teacher")
    assert timed["teacher"] == 12.0 and timed["student"] == 5.0
    assert timed.speedup("student") == 3.0
    assert timed.speedup("teacher", baseline="student") == pytest.approx(1 / 3)


def test_a_faster_model_is_faster() -> None:
    timed = interleaved_latency({"slow": Timed(8), "fast": Timed(2)}, BATCH, rounds=5, calls=3)
    assert timed.speedup("fast") > 1.5 and timed.speedup("slow") == 1.0


@pytest.mark.parametrize(("models", "rounds"), [({}, 5), ({"a": nn.Identity()}, 0)])
def test_nothing_to_time_is_refused(models: dict[str, nn.Module], rounds: int) -> None:
    with pytest.raises(ValueError, match="needs models and at least 1 round"):
        interleaved_latency(models, BATCH, rounds=rounds)


def test_modes_come_back_as_they_were_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    seen = []
    with contextlib.suppress(KeyError), evaluating(model):
        seen += [model[0].training, torch.is_grad_enabled()]
        raise KeyError
    assert seen == [False, False]
    assert model.training and model[0].training and not model[1].training
    assert torch.is_grad_enabled()


def test_no_gradients_are_recorded() -> None:
    model = Timed(0)
    measure_latency(model, [BATCH], rounds=2)
    assert model.grad_modes == {False}


def test_a_model_without_tensors_is_on_the_cpu() -> None:
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")
