"""`/feedback` and `/monitoring`: true labels for earlier predictions, and what is watched of every model."""

from __future__ import annotations

import importlib
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from pykd.serve.monitoring import Monitoring, Seen
from pykd.serve.monitoring_metrics import MonitoringMetrics
from pykd.serve.state import Answered, State

#: What takes a second to import, before there are requests that would wait for it.
NEEDED = ("scipy.stats", "sklearn.metrics")


class Feedback(BaseModel):
    """The true label of one prediction."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=100, description="of a prediction, as POST /predict answered it")
    label: str = Field(max_length=200, description="name of the class that would have been right")


class FeedbackRequest(BaseModel):
    """True labels of earlier predictions."""

    model_config = ConfigDict(extra="forbid")

    labels: list[Feedback] = Field(min_length=1, max_length=1000)


def router(state: State) -> APIRouter:
    """The routes; predictions of classifiers are watched from here on."""
    routes = APIRouter(tags=["monitoring"])
    for name in NEEDED if state.models else ():
        importlib.import_module(name)
    heads = {name: getattr(served.predictor, "head", None) for name, served in state.models.items()}
    widths = {name: head.width for name, head in heads.items() if head is not None}
    monitoring = Monitoring(state.settings.state, state.settings.thresholds, widths=widths)
    state.metrics.registry.register(MonitoringMetrics(monitoring))
    state.observers.append(lambda answered: _see(state, monitoring, answered))
    state.closing.append(monitoring.close)

    @routes.post("/feedback", summary="True labels of earlier predictions, for rolling accuracy and F1")
    def feedback(request: FeedbackRequest) -> dict[str, Any]:
        taken, unknown = monitoring.label([(entry.id, entry.label) for entry in request.labels])
        return {"taken": taken, "unknown": unknown}

    @routes.get("/monitoring", summary="Drift against the baseline, quality by true labels, latency, alarms")
    def shown() -> dict[str, Any]:
        return monitoring.state()

    return routes


def _see(state: State, monitoring: Monitoring, answered: Answered) -> None:
    """Hand a request's answers over; models that do not classify whole inputs are not watched."""
    probabilities = [one.probabilities for one in answered.answers if one.probabilities is not None]
    if len(probabilities) < len(answered.ids):
        return
    predictor = state.models[answered.model_name].predictor
    labels = [predictor.labels[one.index or 0] for one in answered.answers]
    lengths = answered.lengths if predictor.takes == "text" else None
    vectors = [one.vector for one in answered.answers if one.vector is not None]
    complete = vectors if len(vectors) == len(labels) else None
    monitoring.see(
        Seen(answered.model_name, answered.ids, labels, probabilities, lengths, answered.latency_ms, complete)
    )
