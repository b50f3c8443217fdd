"""Monitoring inside the service: predictions go by a queue to a thread that logs them, watches for drift and alarms."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pykd.errors import PykdError
from pykd.monitoring import Baseline, ModelWatch, Prediction, RotatingLog, Thresholds, quantities, read_log
from pykd.monitoring.service_log import SERVICE_LOG

logger = logging.getLogger(__name__)

#: Predictions of a model from one comparison with its baseline to the next.
EVERY = 50
#: Predictions that may wait for the thread; more are not watched, and counted.
WAITING = 10_000


class UnknownPredictionError(PykdError, LookupError):
    """No prediction with this id waits for its label."""


@dataclass(frozen=True)
class Seen:
    """One request's answers: ids and classes by input, and what is known of each. lengths: of texts, in tokens."""

    model: str
    ids: Sequence[str]
    labels: Sequence[str]
    probabilities: Sequence[Sequence[float]]
    lengths: Sequence[int] | None
    latency_ms: float
    vectors: Sequence[Any] | None = None


class Monitoring:
    """Watches the models of a service. folder: ``service.jsonl`` is its log, ``baselines/NAME.json`` the baselines.

    None keeps nothing. What an earlier service logged there is taken up again. A model without a baseline gets one from
    its first predictions, which is stored.
    """

    def __init__(self, folder: str | Path | None, thresholds: Thresholds | None = None, *, every: int = EVERY) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.thresholds, self.every = thresholds or Thresholds(), every
        self.unwatched = 0
        self._lock = threading.Lock()
        self._queue: queue.Queue[Seen | None] = queue.Queue(WAITING)
        self._watches: dict[str, ModelWatch] = {}
        self._log: RotatingLog | None = None
        self._thread: threading.Thread | None = None
        if self.folder is not None:
            self._replay(self.folder)
            self._log = RotatingLog(self.folder / SERVICE_LOG)
            self._note("start")

    def see(self, seen: Seen) -> None:
        """Take one request's answers; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pykd-monitoring", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(seen)
        except queue.Full:
            self.unwatched += len(seen.ids)

    def label(self, id: str, label: str) -> dict[str, Any]:
        """Take the true label of a prediction; what was predicted, and the model's quality since.

        Raises UnknownPredictionError for an id that is not, or no longer, known, or that has its label.
        """
        self.flush()
        with self._lock:
            watch = next((watch for watch in self._watches.values() if watch.knows(id)), None)
            if watch is None:
                raise UnknownPredictionError(
                    f"no prediction {id!a} waits for its label: it is old, labelled, or never was"
                )
            answer = watch.labelled(id, label)
            found = {"model": watch.name, "predicted": answer, "correct": answer == label, **watch.quality()}
            alarms = [alarm for alarm in watch.alarms if alarm.startswith(("accuracy", "f1"))]
        self._note("label", model=watch.name, id=id, label=label, predicted=answer)
        quality = {name: found[name] for name in ("labels", "accuracy", "f1")}
        self._note("quality", model=watch.name, **quality, alarms=alarms)
        return {**found, "alarms": alarms}

    def state(self) -> dict[str, Any]:
        """Every model's window, drift, quality and alarms, as of now."""
        self.flush()
        with self._lock:
            for watch in self._watches.values():
                watch.check()
            models = {name: watch.state() for name, watch in self._watches.items()}
        return {"models": models, "unwatched": self.unwatched}

    def flush(self) -> None:
        """Return when everything seen so far has been taken."""
        self._queue.join()

    def close(self) -> None:
        """Take what is waiting, and end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._log is not None:
            self._note("stop")
            self._log.close()
            self._log = None

    def _work(self) -> None:
        while (seen := self._queue.get()) is not None:
            try:
                self._take(seen)
            except Exception:
                logger.exception("a prediction of %s could not be watched", seen.model)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _take(self, seen: Seen) -> None:
        with self._lock:
            watch = self._watch(seen.model)
            for row, id in enumerate(seen.ids):
                latency_ms = None if row else seen.latency_ms
                length = None if seen.lengths is None else seen.lengths[row]
                numbers = quantities(seen.probabilities[row], length=length, latency_ms=latency_ms)
                vector = None if seen.vectors is None else np.asarray(seen.vectors[row], dtype=np.float32)
                had_baseline = watch.baseline is not None
                kept = watch.predicted(Prediction(id, seen.labels[row], numbers, vector))
                rounded = {name: round(value, 6) for name, value in kept.numbers.items()}
                self._note("prediction", model=watch.name, id=id, label=kept.label, numbers=rounded)
                if not had_baseline:
                    self._store(watch)
                if watch.predictions % self.every == 0 and watch.check():
                    drift = [found.to_dict() for found in watch.drifts]
                    alarms = [found.sentence() for found in watch.drifts if found.alarm]
                    self._note("drift", model=watch.name, drift=drift, alarms=alarms)

    def _watch(self, name: str) -> ModelWatch:
        if name not in self._watches:
            file = self._baseline(name)
            baseline = Baseline.load(file) if file is not None and file.exists() else None
            self._watches[name] = ModelWatch(name, baseline, self.thresholds)
        return self._watches[name]

    def _baseline(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / "baselines" / f"{quote(name, safe='')}.json"

    def _store(self, watch: ModelWatch) -> None:
        """Write a new baseline where there is a place for it."""
        file = self._baseline(watch.name)
        if file is not None and watch.baseline is not None and not file.exists():
            watch.baseline.save(file)

    def _note(self, event: str, **values: Any) -> None:
        if self._log is not None:
            self._log.append(event, **values)

    def _replay(self, folder: Path) -> None:
        """Windows, open ids and labels as the log tells them."""
        for file in sorted((folder / "baselines").glob("*.json")):
            self._watch(unquote(file.stem))
        for event in read_log(folder / SERVICE_LOG):
            if event["event"] == "prediction":
                watch = self._watch(event["model"])
                watch.predicted(Prediction(event["id"], event["label"], event["numbers"]))
            elif event["event"] == "label" and self._watch(event["model"]).knows(event["id"]):
                self._watch(event["model"]).labelled(event["id"], event["label"])
        for watch in self._watches.values():
            self._store(watch)


class MonitoringMetrics(Collector):
    """What is watched, for Prometheus."""

    def __init__(self, monitoring: Monitoring) -> None:
        self._monitoring = monitoring

    def collect(self) -> Iterator[Metric]:
        """One gauge a kind; quality only of models with labels."""
        state = self._monitoring.state()
        psi = GaugeMetricFamily("pykd_drift_psi", "Population stability index.", labels=["model", "quantity"])
        ks = GaugeMetricFamily("pykd_drift_ks", "Kolmogorov-Smirnov distance.", labels=["model", "quantity"])
        alarms = GaugeMetricFamily("pykd_alarms", "Quantities beyond their thresholds.", labels=["model"])
        accuracy = GaugeMetricFamily("pykd_rolling_accuracy", "Over the newest true labels.", labels=["model"])
        f1 = GaugeMetricFamily("pykd_rolling_f1", "Macro F1 over the newest true labels.", labels=["model"])
        labels = GaugeMetricFamily("pykd_rolling_labels", "True labels in the window.", labels=["model"])
        for name, model in state["models"].items():
            for drift in model["drift"]:
                psi.add_metric([name, drift["quantity"]], drift["psi"])
                if drift["ks"] is not None:
                    ks.add_metric([name, drift["quantity"]], drift["ks"])
            alarms.add_metric([name], len(model["alarms"]))
            labels.add_metric([name], model["quality"]["labels"])
            for gauge, value in ((accuracy, model["quality"]["accuracy"]), (f1, model["quality"]["f1"])):
                if value is not None:
                    gauge.add_metric([name], value)
        unwatched = CounterMetricFamily("pykd_unwatched_predictions", "Not watched: too many waited.")
        unwatched.add_metric([], state["unwatched"])
        yield from (psi, ks, alarms, accuracy, f1, labels, unwatched)
