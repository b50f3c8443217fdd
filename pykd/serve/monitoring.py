"""Monitoring inside the service: predictions go by a queue to a thread that logs them, watches for drift and alarms."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from pykd.errors import ArtifactError
from pykd.monitoring import Baseline, ModelWatch, Prediction, RotatingLog, Thresholds, quantities, read_log
from pykd.monitoring.service_log import SERVICE_LOG

logger = logging.getLogger(__name__)

#: Predictions of a model from one comparison with its baseline to the next.
EVERY = 50
#: Predictions that may wait for the thread; more are not watched, and counted.
WAITING = 10_000


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
    its first predictions, which is stored. widths: of the embeddings of the models that are served, by name.

    Raises ArtifactError for a baseline that cannot be read, or is of a model with embeddings of another width.
    """

    def __init__(
        self,
        folder: str | Path | None,
        thresholds: Thresholds | None = None,
        *,
        every: int = EVERY,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.thresholds, self.every = thresholds or Thresholds(), every
        self.unwatched, self._widths = 0, widths or {}
        self._lock = threading.Lock()
        self._queue: queue.Queue[Seen | threading.Event | None] = queue.Queue(WAITING)
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

    def label(self, true: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Take the true labels of predictions, pairs of an id and a label.

        Returns what was predicted, with the quality of its model after them all, and the ids that are not, or no
        longer, known, or have their label.
        """
        self.flush()
        taken: list[dict[str, Any]] = []
        unknown: list[str] = []
        with self._lock:
            for id, label in true:
                watch = next((watch for watch in self._watches.values() if watch.knows(id)), None)
                if watch is None:
                    unknown.append(id)
                    continue
                answer = watch.labelled(id, label)
                self._note("label", model=watch.name, id=id, label=label, predicted=answer)
                taken.append({"id": id, "model": watch.name, "predicted": answer, "correct": answer == label})
            since = {name: self._quality(name) for name in {entry["model"] for entry in taken}}
        return [entry | since[entry["model"]] for entry in taken], unknown

    def _quality(self, name: str) -> dict[str, Any]:
        watch = self._watches[name]
        found = watch.quality()
        found["alarms"] = watch.quality_alarms(found)
        self._note("quality", model=name, **found)
        return found

    def state(self) -> dict[str, Any]:
        """Every model's window, drift, quality and alarms, as of now."""
        self.flush()
        with self._lock:
            for watch in self._watches.values():
                watch.check()
            models = {name: watch.state() for name, watch in self._watches.items()}
        return {"models": models, "unwatched": self.unwatched}

    def flush(self) -> None:
        """Return when everything seen so far has been taken; what comes meanwhile is not waited for."""
        thread, taken = self._thread, threading.Event()
        if thread is not None:
            self._queue.put(taken)
            while thread.is_alive() and not taken.wait(1.0):
                pass

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
            if isinstance(seen, threading.Event):
                seen.set()
                continue
            try:
                self._take(seen)
            except Exception:
                logger.exception("a prediction of %s could not be watched", seen.model)

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
            width, embeddings = self._widths.get(name), baseline.embeddings if baseline is not None else None
            if embeddings is not None and width is not None and len(embeddings.mean) != width:
                raise ArtifactError(
                    f"{file} is of another model: its embeddings have {len(embeddings.mean)} numbers, those of {name} "
                    f"{width}; remove it, or make it again"
                )
            self._watches[name] = ModelWatch(name, baseline, self.thresholds)
        return self._watches[name]

    def _baseline(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / "baselines" / f"{quote(name, safe='')}.json"

    def _store(self, watch: ModelWatch) -> None:
        """Write a new baseline where there is a place for it; a disk without room costs the file alone."""
        file = self._baseline(watch.name)
        if file is not None and watch.baseline is not None and not file.exists():
            try:
                watch.baseline.save(file)
            except ArtifactError as error:
                logger.warning("the next service makes a new baseline of %s: %s", watch.name, error)

    def _note(self, event: str, **values: Any) -> None:
        if self._log is not None:
            self._log.append(event, **values)

    def _replay(self, folder: Path) -> None:
        """Windows, open ids and labels as the log tells them."""
        for file in sorted((folder / "baselines").glob("*.json")):
            self._watch(unquote(file.stem))
        damaged = 0
        for event in read_log(folder / SERVICE_LOG):
            try:
                self._again(event)
            except (KeyError, TypeError, ValueError, AttributeError):
                damaged += 1
        if damaged:
            logger.warning("%d lines of %s are no events of a service: passed over", damaged, folder / SERVICE_LOG)

    def _again(self, event: Mapping[str, Any]) -> None:
        """A prediction or a label of an earlier service."""
        if event["event"] == "prediction":
            numbers = {str(name): float(value) for name, value in event["numbers"].items()}
            self._watch(str(event["model"])).remembered(Prediction(str(event["id"]), str(event["label"]), numbers))
        elif event["event"] == "label" and (watch := self._watch(str(event["model"]))).knows(event["id"]):
            watch.labelled(event["id"], str(event["label"]))
