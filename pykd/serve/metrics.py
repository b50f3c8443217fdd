"""Numbers for Prometheus, in a registry of the service's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

if TYPE_CHECKING:
    from pykd.serve.state import State

#: Upper ends of the times, in seconds: fine around the 20 ms that a small model is to answer in.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Health(BaseModel):
    """Says "ok", unless the service is being stopped."""

    detail: str


class Metrics:
    """The metrics and their registry; others may register theirs with `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pykd_requests", "Requests answered.", ["method", "path", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "pykd_request_seconds", "From arrival to answer.", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.predictions = Counter("pykd_predictions", "Inputs answered.", ["model"], registry=self.registry)
        self.batch_inputs = Histogram(
            "pykd_batch_inputs", "Inputs computed together.", ["model"], buckets=BATCHES, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "pykd_batch_seconds", "Computing one batch.", ["model"], buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge("pykd_waiting_inputs", "Inputs not yet computed.", ["model"], registry=self.registry)
        self.observer_failures = Counter("pykd_observer_failures", "Observers that failed.", registry=self.registry)


def router(state: State) -> APIRouter:
    """`GET /metrics` and `GET /healthz`."""
    routes = APIRouter(tags=["service"])

    @routes.get("/healthz", summary="Whether requests are answered")
    async def healthz(response: Response) -> Health:
        stopping = state.stopping.is_set()
        response.status_code = 503 if stopping else 200
        return Health(detail="the service is being stopped" if stopping else "ok")

    @routes.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def metrics() -> Response:  # in a thread: monitoring compares distributions for it
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
