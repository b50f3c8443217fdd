"""Where the router draws the line: a threshold that sends a given share of held-out rows deep, and routes by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import nearest
from pykd.models.adapter import call, move, unwrap
from pykd.models.router_config import ROUTINGS


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, deep_share: float | None = None) -> float:
    """Set ``config.threshold`` so that this share of the rows of ``batches`` goes deep; returns it.

    The threshold lies half-way between the lowest score that goes deep and the highest that does not. deep_share: 0..1,
    both excluded; by default that of the configuration, which takes the new one over. batches: dicts of inputs, of rows
    that were not trained on; labels are not looked at. The threshold is saved with the model. Quantize first, then
    calibrate: rounding moves the scores.

    Raises ValueError for a model without a router, a share out of range, and no rows.
    """
    inner: Any = unwrap(model)
    if getattr(inner, "router", None) is None:
        raise ValueError(f"{type(inner).__name__} has no router to calibrate: it takes a learned RouterConfig.routing")
    share = inner.config.deep_share if deep_share is None else deep_share
    if not 0 < share < 1:
        raise ValueError(f"deep_share must be above 0 and below 1, got {share!r}")
    scores = _scores(model, batches)
    if not len(scores):
        raise ValueError("calibrate needs rows to score, got no batches")
    ordered = scores.sort(descending=True).values.double()
    deep = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    threshold = float(ordered[max(0, deep - 1) : deep + 1].mean())
    inner.config.threshold, inner.config.deep_share = threshold, share
    sent = float((scores > threshold).float().mean())
    record = {"stage": "calibrate", "method": "quantile", "parameters": {"deep_share": share},
              "rows": len(scores), "threshold": threshold, "sent_deep": sent}  # fmt: skip
    inner.__dict__["pykd_report"] = [*getattr(inner, "pykd_report", []), record]
    return threshold


@contextmanager
def routed(model: nn.Module, routing: str) -> Iterator[None]:
    """Every row through one branch, "fast" or "deep", while inside; "learned" is the router again.

    Raises ValueError for an unknown routing, and a branch that the model was built without.
    """
    inner: Any = unwrap(model)
    if routing not in ROUTINGS:
        raise ValueError(nearest("routing", routing, ROUTINGS))
    if routing != inner.config.routing and inner.router is None:
        raise ValueError(f"the model was built with routing={inner.config.routing!r} and has no other branch")
    before = inner.routing
    inner.routing = routing
    try:
        yield
    finally:
        inner.routing = before


def _scores(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Scores of all rows, on the CPU, in evaluation mode and without the deep branch."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        model.eval()
        with routed(model, "fast"):
            found = [call(model, move(batch, device)).scores.cpu() for batch in batches]
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(found) if found else torch.zeros(0)
