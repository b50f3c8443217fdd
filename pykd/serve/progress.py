"""How far a job is, from the files that its run writes: trainings, finished stages, the log, the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError
from pykd.pipeline.directory import EVENTS, STATE
from pykd.pipeline.monitor import Monitor, Training

#: Lines of the log, and points of a curve, that are shown.
LINES, POINTS = 12, 60
#: Bytes at the end of a log that these lines are looked for in.
TAIL = 16_384


class Progress:
    """The runs in the folder of a job: its recipe's own, and those of the recipes that follow it.

    :meth:`snapshot` reads what was added to their logs since the last time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._monitors: dict[Path, Monitor] = {}

    def snapshot(self) -> list[dict[str, Any]]:
        """One entry a run, in the order in which they began."""
        states = _states(self.folder)
        begun = sorted(
            (state.get("started", ""), folder != self.folder, folder) for folder, state in states.items() if state
        )
        return [self._run(folder, states[folder]) for _, _, folder in begun]

    def _run(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": state.get("name", folder.name),
            "finished": bool(state.get("finished")),
            "stages": [file.stem for file in sorted((folder / "stages").glob("*.json"))],
            "trainings": [_training(training) for training in self._trainings(folder)],
            "log": tail(folder / "run.log"),
            "report": (folder / "report.html").is_file(),
        }

    def _trainings(self, folder: Path) -> list[Training]:
        if folder not in self._monitors:
            if not (folder / EVENTS).is_file():
                return []
            self._monitors[folder] = Monitor(folder)
        try:
            self._monitors[folder].read()
        except (ArtifactError, OSError):  # a line that is being written over; the next look reads the file anew
            del self._monitors[folder]
            return []
        return list(self._monitors[folder].trainings.values())


def report_of(folder: Path, run: str | None) -> Path | None:
    """report.html of a job's run, by default its recipe's own; None where there is none of that name."""
    for found, state in _states(folder).items():
        if run is None or state.get("name") == run:
            report = found / "report.html"
            return report if report.is_file() else None
    return None


def tail(file: Path, lines: int = LINES) -> list[str]:
    """The last lines of a text file; empty where there is none."""
    try:
        with open(file, "rb") as content:
            size = content.seek(0, 2)
            content.seek(max(0, size - TAIL))
            return content.read().decode("utf-8", "replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _training(training: Training) -> dict[str, Any]:
    losses = [float(record["loss"]) for record in training.records]
    step = max(1, -(-len(losses) // POINTS))
    last = training.validations[-1] if training.validations else None
    return {
        "name": training.name,
        "step": training.step,
        "total_steps": training.total_steps,
        "loss": losses[-1] if losses else None,
        "losses": losses[::step],
        "steps_per_s": round(training.rate, 3),
        "seconds_left": None if training.seconds_left is None else round(training.seconds_left, 1),
        "ended": training.ended,
        "said": training.outcome or (last["sentence"] if last else None),
    }


def _states(folder: Path) -> dict[Path, dict[str, Any]]:
    """Folder of every run of a job, its recipe's own first, with what it says of itself."""
    return {file.parent: _read(file) for file in [folder / STATE, *folder.glob(f"*/{STATE}")]}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
