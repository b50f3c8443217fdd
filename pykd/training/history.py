"""What happened at each step of a run, as plain numbers for plots, reports and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Curve of one training run.

    records: one dict a step: ``step`` (from 1), ``epoch`` (share of passes done), ``loss``, ``lr``, ``grad_norm`` and
    what the loss function reported; steps that were rolled back are not among them. validations: every validation, also
    of steps that were rolled back: ``step``, the ``metrics``, ``action`` (best, keep, roll back, stop) with its reason
    in ``sentence``, ``change`` against the best and ``last_change`` against the one before as shares (above 0 is
    better), ``retention`` of the teacher's value, and ``examples`` of the worst errors. seconds: time spent in steps,
    over all resumed parts. kept_step: the step whose weights the model was left with, when it is not the last.
    outcome: how a guarded run ended, in words. wrong: numbers of the examples that were wrong at the newest validation.
    """

    total_steps: int
    records: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    validations: list[dict[str, Any]] = field(default_factory=list)
    kept_step: int | None = None
    outcome: str | None = None
    wrong: list[int] | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.records)

    def curve(self, points: int = 200) -> list[dict[str, float]]:
        """At most ``points`` records, evenly spaced, the first and the last among them."""
        if self.steps <= points:
            return list(self.records)
        return [self.records[round(i * (self.steps - 1) / (points - 1))] for i in range(points)]

    def summary(self) -> dict[str, Any]:
        """What a report keeps of the run: steps, seconds, first and last loss, and the thinned curve."""
        first, last = (self.records[0]["loss"], self.records[-1]["loss"]) if self.records else (None, None)
        summary: dict[str, Any] = {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "first_loss": first,
            "last_loss": last,
            "curve": self.curve(),
        }
        if self.validations:
            summary |= {"validations": self.validations, "kept_step": self.kept_step, "outcome": self.outcome}
        return summary
