"""A tiny real task and reports with chosen numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pykd.data.bundle import DataBundle, stack
from pykd.evaluation import Report
from pykd.evaluation.metrics import quality


@pytest.fixture
def corners() -> DataBundle:
    """Nine one-hot vectors of three classes: the identity solves it."""
    items = [{"pixel_values": torch.eye(3)[i % 3], "labels": i % 3} for i in range(9)]
    return DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="corners")


def make_report(name: str = "teacher", wrong: int = 1, **changes: Any) -> Report:
    labels = [i % 3 for i in range(12)]
    predictions = [(label + 1) % 3 if i < wrong else label for i, label in enumerate(labels)]
    scored = quality(labels, predictions, ("a", "b", "c"))
    values: dict[str, Any] = {
        "name": name,
        "accuracy": scored.accuracy,
        "precision": scored.precision,
        "recall": scored.recall,
        "f1": scored.f1,
        "per_class": scored.per_class,
        "confusion": scored.confusion,
        "class_names": ("a", "b", "c"),
        "parameters": 1_000_000,
        "nonzero_parameters": 1_000_000,
        "size_bytes": 4_000_000,
        "latency_p50_ms": 10.0,
        "latency_p95_ms": 12.0,
        "latency_p99_ms": 15.0,
        "latency_rounds": 50,
        "throughput_per_s": 500.0,
        "throughput_batch": 64,
        "threads": 2,
        "device": "cpu",
        "labels": tuple(labels),
        "predictions": tuple(predictions),
        "confidences": tuple(0.9 for _ in labels),
    }
    return Report(**{**values, **changes})


@pytest.fixture(name="make_report")
def _make_report() -> Callable[..., Report]:
    return make_report


@pytest.fixture
def reports() -> list[Report]:
    return [
        make_report(),
        make_report("1-distill", 2, size_bytes=1_000_000, parameters=250_000, speedup_over={"teacher": 2.0}),
        make_report("2-prune", 3, size_bytes=500_000, latency_p50_ms=10.0, speedup_over={"1-distill": 1.0}),
    ]
