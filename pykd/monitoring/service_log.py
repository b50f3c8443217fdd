"""The log of a service as `pykd monitor` shows it: each model's traffic, drift, quality and alarms, while it grows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError
from pykd.monitoring.log import opened, parse, rotated
from pykd.monitoring.watch import latencies

#: The log in the folder that a service keeps its state in.
SERVICE_LOG = "service.jsonl"
#: Predictions that rates and latencies are told of.
RECENT = 500


@dataclass
class Traffic:
    """One model's part of the log."""

    model: str
    predictions: int = 0
    labels: int = 0
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT))
    drift: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """One more event of this model."""
        kind = event["event"]
        if kind == "prediction":
            self.predictions += 1
            self.recent.append({"time": float(event["time"]), **event["numbers"]})
        elif kind == "label":
            self.labels += 1
        elif kind == "drift":
            self.drift = event
        elif kind == "quality":
            self.quality = event

    @property
    def rate(self) -> float:
        """Predictions a second over the newest; 0 when there are too few to tell."""
        times = [entry["time"] for entry in self.recent]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0

    def mean(self, name: str) -> float | None:
        """Mean of a quantity over the newest predictions; None where they have none."""
        values = [entry[name] for entry in self.recent if name in entry]
        return sum(values) / len(values) if values else None

    @property
    def alarms(self) -> list[str]:
        """What was beyond its threshold when it was last looked at."""
        return [*self.drift.get("alarms", ()), *self.quality.get("alarms", ())]


class ServiceMonitor:
    """The models in a service's log, rotated parts first; :meth:`read` takes what was added."""

    headings = ("model", "predictions", "rate", "p50 / p95 / p99 ms", "confidence", "drift", "accuracy", "f1", "alarms")
    ended = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) / SERVICE_LOG if Path(path).is_dir() else Path(path)
        if not rotated(self.path):
            raise ArtifactError(f"{self.path} does not exist: name the folder of a service, or its log")
        self.models: dict[str, Traffic] = {}
        self.torn = 0
        self._read: dict[int, int] = {}

    def read(self) -> bool:
        """Take the whole lines that were added since the last time, also those rotated away; True when any were."""
        any_new, offsets = False, dict[int, int]()
        with opened(self.path) as files:
            for lines in files:
                status = os.fstat(lines.fileno())
                start = self._read.get(status.st_ino, 0)
                start = start if start <= status.st_size else 0  # another file under an old number
                lines.seek(start)
                added = lines.read()
                whole = added[: added.rfind(b"\n") + 1]
                offsets[status.st_ino] = start + len(whole)
                any_new |= bool(whole)
                for line in whole.splitlines(keepends=True):
                    self._take(line)
        self._read = offsets
        return any_new

    def _take(self, line: bytes) -> None:
        event = parse(line)
        if event is None:
            self.torn += 1
        elif "model" in event:
            name = str(event["model"])
            try:
                self.models.setdefault(name, Traffic(name)).take(event)
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(f"{self.path} is no log of a service: {line[:60]!r} ({error!r})") from None

    def rows(self) -> Iterator[tuple[str, ...]]:
        """One row a model, as ``headings`` name it."""
        for traffic in self.models.values():
            times = latencies([entry["latency_ms"] for entry in traffic.recent if "latency_ms" in entry])
            confidence = traffic.mean("confidence")
            worst = max(traffic.drift.get("drift", ()), key=lambda found: found["psi"], default=None)
            yield (
                traffic.model,
                str(traffic.predictions),
                f"{traffic.rate:.2f}/s" if traffic.rate else "-",
                " / ".join(f"{value:.1f}" for value in times.values()) or "-",
                f"{confidence:.3f}" if confidence is not None else "-",
                f"{worst['quantity']} PSI {worst['psi']:.3f}" if worst else "-",
                *(self._share(traffic, name) for name in ("accuracy", "f1")),
                "; ".join(traffic.alarms) or "none",
            )

    @staticmethod
    def _share(traffic: Traffic, name: str) -> str:
        value = traffic.quality.get(name)
        return f"{value:.4f} of {traffic.quality['labels']}" if value is not None else "-"


def is_service_log(path: str | Path) -> bool:
    """Whether a folder is that of a service, or a file its log: told by the file's name, or its first whole line.

    >>> is_service_log("runs/digits")
    False
    """
    found = Path(path)
    if found.is_dir():
        return bool(rotated(found / SERVICE_LOG))
    if not found.is_file():
        return False
    with open(found, "rb") as lines:
        first = parse(lines.readline())
    return first is not None and "run" not in first
