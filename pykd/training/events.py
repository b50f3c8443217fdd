"""The log of a run for machines: one JSON object a line, appended as it happens, so that others can watch it grow.

Every line has ``time`` (seconds since 1970), ``run`` (the training's label) and ``event``: ``begin`` (``step`` it
starts from, ``total_steps``), ``step`` (the step's record), ``validation``, ``end``. A ``begin`` or a validation
whose ``action`` is ``roll back`` takes back the steps after its own.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to a file, or, without one, does nothing. A full disk silences it: checkpoints report the disk."""

    def __init__(self, path: str | Path | None, run: str) -> None:
        self.path = Path(path) if path is not None else None
        self.run = run

    def write(self, event: str, **values: Any) -> None:
        """Append one event."""
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "run": self.run, "event": event, **values}, default=str)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s): the run goes on without it", self.path, error.strerror)
            self.path = None
