"""What each verb leaves behind in ``model.pykd_report``, and the checks that all verbs share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_record(model: nn.Module, *, stage: str, method: str, parameters: dict[str, Any], **facts: Any) -> None:
    """Append one JSON-able entry to ``model.pykd_report``: which verb, how, with what, and what came of it."""
    entry = {"stage": stage, "method": method, "parameters": parameters, **facts}
    model.__dict__.setdefault("pykd_report", []).append(entry)


def require_finite_weights(model: nn.Module, role: str) -> None:
    """Raise ValueError naming the first parameter or buffer that holds NaN or infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) and not name.endswith("mask"):
            raise ValueError(
                f"the {role}'s {name!r} holds NaN or infinite values: load good weights, or train again from a "
                "checkpoint before they appeared"
            )
