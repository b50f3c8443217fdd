"""What each verb leaves behind in ``model.pykd_report``, and the checks that all verbs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pykd.evaluation.counting import count_parameters


def add_record(model: nn.Module, *, stage: str, method: str, parameters: dict[str, Any], **facts: Any) -> None:
    """Append one JSON-able entry to ``model.pykd_report``: which verb, how, with what, and what came of it."""
    entry = {"stage": stage, "method": method, "parameters": parameters, **facts}
    model.__dict__.setdefault("pykd_report", []).append(entry)


@contextmanager
def recorded_change(
    model: nn.Module, *, stage: str, method: str, parameters: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Record a change of structure: the body fills the yielded dict; weights are counted before and after."""
    before = count_parameters(model)
    facts: dict[str, Any] = {}
    yield facts
    after = count_parameters(model)
    counts = {
        "parameters_before": before[0],
        "parameters_after": after[0],
        "nonzero_before": before[1],
        "nonzero_after": after[1],
    }
    add_record(model, stage=stage, method=method, parameters=parameters, **counts, **facts)


def require_finite_weights(model: nn.Module, role: str) -> None:
    """Raise ValueError naming the first parameter or buffer that holds NaN or infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) and not name.endswith("mask"):
            raise ValueError(
                f"the {role}'s {name!r} holds NaN or infinite values: load good weights, or train again from a "
                "checkpoint before they appeared"
            )
