"""`pykd monitor`: a run or a service as its log tells it, in this process or another, while it grows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError
from pykd.monitoring.service_log import ServiceMonitor, is_service_log
from pykd.pipeline.directory import EVENTS, STATE

#: Steps that the rate is averaged over.
RECENT = 50
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Training:
    """One training of a run: its curve as far as it is valid, its validations, and how it ended."""

    name: str
    total_steps: int = 0
    first: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outcome: str | None = None
    ended: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.records[-1]["step"]) if self.records else self.first

    @property
    def rate(self) -> float:
        """Steps a second over the last steps; 0 when there are too few to tell."""
        recent = self.times[-RECENT:]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None when it is not known."""
        return (self.total_steps - self.step) / self.rate if self.rate else None

    def take(self, event: dict[str, Any]) -> None:
        """One more event. A beginning, and a rollback, takes back the steps after its own."""
        kind = event["event"]
        if kind == "begin":
            self.total_steps, self.first, self.ended = event["total_steps"], event["step"], False
            self._back_to(event["step"])
            self.times = []
        elif kind == "step":
            self.records.append(event)
            self.times = [*self.times[-RECENT:], event["time"]]
        elif kind == "validation":
            self.validations.append(event)
            best = [entry for entry in self.validations if entry["action"] == "best"]
            if event["action"] in ("roll back", "stop") and best:
                self._back_to(best[-1]["step"])
        elif kind == "end":
            self.ended, self.outcome = True, event.get("outcome")

    def _back_to(self, step: int) -> None:
        self.records = [record for record in self.records if record["step"] <= step]


class Monitor:
    """The trainings in a log of events, in the order in which they began; :meth:`read` takes what was added."""

    headings = ("training", "step", "loss", "curve", "lr", "rate", "left", "validation")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) / EVENTS if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"{self.path} does not exist: name the folder of a run, or its log of events")
        self.trainings: dict[str, Training] = {}
        self._read, self._first = 0, b""

    def read(self) -> bool:
        """Take the lines that were added since the last time, whole ones only; True when there were any."""
        if not self.path.exists():  # started over, and nothing is trained yet
            return self._begin_again()
        with open(self.path, "rb") as file:
            first = file.readline()
            if self._first and first != self._first:  # another log in its place
                self._begin_again()
            self._first = first if first.endswith(b"\n") else b""
            file.seek(self._read)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        self._read += len(added)
        for line in added.splitlines():
            try:
                event = json.loads(line)
                name = str(event["run"])
                self.trainings.setdefault(name, Training(name)).take(event)
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{self.path} is no log of events: {line[:60]!r} ({error!r})") from None
        return bool(added)

    @property
    def ended(self) -> bool:
        """Whether the run is finished; of a log without a run's folder around it, whether its newest training ended."""
        state = self.path.with_name(STATE)
        if state.is_file():
            return bool(json.loads(state.read_text(encoding="utf-8")).get("finished"))
        return bool(self.trainings) and list(self.trainings.values())[-1].ended

    def _begin_again(self) -> bool:
        """Forget a run that was replaced by another one; True where there was something to forget."""
        known, self.trainings, self._read, self._first = bool(self.trainings), {}, 0, b""
        return known

    def rows(self) -> Iterator[tuple[str, ...]]:
        """One row a training: name, steps, loss, its curve, learning rate, rate, time left, newest validation."""
        for training in self.trainings.values():
            last = training.records[-1] if training.records else None
            losses = [record["loss"] for record in training.records]
            left = training.seconds_left
            validation = training.validations[-1] if training.validations else None
            yield (
                training.name,
                f"{training.step}/{training.total_steps}",
                f"{last['loss']:.4f}" if last else "-",
                sparkline(losses),
                f"{last['lr']:.2e}" if last else "-",
                f"{training.rate:.2f}/s" if training.rate else "-",
                "ended" if training.ended else duration(left) if left is not None else "-",
                training.outcome or (f"{validation['action']}: {validation['sentence']}" if validation else "-"),
            )


def watch(path: str | Path, *, once: bool = False, every: float = 1.0) -> None:
    """Show a run on the terminal until it is finished, or a service's log, until Ctrl-C.

    once: as it is now. Of a log without a run's folder around it, until its newest training has ended.
    """
    from rich.console import Console
    from rich.live import Live

    monitor: Monitor | ServiceMonitor = ServiceMonitor(path) if is_service_log(path) else Monitor(path)
    console = Console()
    monitor.read()
    if once or not console.is_terminal:
        console.print(table(monitor), crop=False)
        return
    with Live(table(monitor), console=console, refresh_per_second=4) as live:
        while not monitor.ended:
            time.sleep(every)
            if monitor.read():
                live.update(table(monitor))


def table(monitor: Monitor | ServiceMonitor) -> Any:
    """The rows as a table of rich."""
    from rich.table import Table

    shown = Table(title=str(monitor.path), title_justify="left")
    for heading in monitor.headings:
        shown.add_column(heading, overflow="fold", no_wrap=heading != monitor.headings[-1])
    for row in monitor.rows():
        shown.add_row(*row)
    return shown


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve in blocks, lowest to highest.

    >>> sparkline([0.0, 1.0, 2.0, 7.0])
    '▁▂▃█'
    """
    if not values:
        return ""
    chosen = values if len(values) <= width else [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
    low, high = min(chosen), max(chosen)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in chosen)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725)
    '1:02:05'
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
