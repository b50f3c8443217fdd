"""The quality guard: when a run is rolled back to its best checkpoint, and when it ends early.

A pure function of numbers; what is rolled back, and from where, is the business of the loop.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pykd.evaluation.direction import higher_is_better, improvement, retention


@dataclass(frozen=True)
class Guard:
    """What a run must not lose.

    metric: the value of the validation that counts; None takes its first. higher_is_better: None goes by the metric's
    name (loss, perplexity and TER improve by falling). drop: the share of the best value, 0..1, that may be lost.
    teacher: the teacher's value of the metric; retention: the share of it, 0..1, that must be kept, once reached.
    rollbacks: how often the run goes back to its best checkpoint before it ends early. lr_factor: what the learning
    rate is multiplied by, each time.

    >>> Guard(metric="f1", teacher=0.91).retention
    0.9
    """

    metric: str | None = None
    higher_is_better: bool | None = None
    drop: float = 0.05
    teacher: float | None = None
    retention: float = 0.9
    rollbacks: int = 2
    lr_factor: float = 0.3

    def __post_init__(self) -> None:
        for name in ("drop", "retention"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"guard: {name} is a share, 0..1, got {getattr(self, name)!r}")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"guard: lr_factor must lie between 0 and 1, got {self.lr_factor!r}")
        if isinstance(self.rollbacks, bool) or not isinstance(self.rollbacks, int) or self.rollbacks < 0:
            raise ValueError(f"guard: rollbacks must be a whole number of at least 0, got {self.rollbacks!r}")
        if self.metric is not None:
            higher_is_better(self.metric, self.higher_is_better)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What a guard says of a value: ``action`` is best, keep, roll back or stop; ``sentence`` gives the numbers.

    change: relative to the best before, above 0 is better; None for the first value. retention: of the teacher's value.
    """

    action: str
    sentence: str
    change: float | None
    retention: float | None


def judge(
    guard: Guard, metric: str, value: float, best: float | None, *, best_step: int = 0, rolled_back: int = 0
) -> Verdict:
    """Compare a value with the best so far and with the teacher's.

    >>> judge(Guard(), "accuracy", 0.7, 0.8, best_step=40).action
    'roll back'
    >>> judge(Guard(), "perplexity", 19.0, 20.0).action
    'best'
    """
    higher = higher_is_better(metric, guard.higher_is_better)
    change = improvement(value, best, higher=higher) if best is not None else None
    kept = before = None
    if guard.teacher is not None:
        kept = retention(value, guard.teacher, higher=higher)
        before = retention(best, guard.teacher, higher=higher) if best is not None else 0.0
    found = f"{metric} {value:.6g}"
    share = f", {100 * kept:.1f} % of the teacher's {guard.teacher:.6g}" if kept is not None else ""
    if best is None or change is None:
        return Verdict("best", f"{found} is the first{share}", None, kept)
    if change > 0:
        return Verdict(
            "best", f"{found} is the best so far (before {best:.6g} at step {best_step}){share}", change, kept
        )
    lost = -change > guard.drop
    below = kept is not None and before is not None and kept < guard.retention <= before
    if not lost and not below:
        return Verdict(
            "keep", f"{found}, best {best:.6g} at step {best_step}, change {_percent(change)}{share}", change, kept
        )
    limit = f"more than {100 * guard.drop:g} %" if lost else f"and keeps less than {100 * guard.retention:g} %"
    reason = f"{found} is {_percent(change)} against the best, {best:.6g} at step {best_step}, {limit}{share}"
    if rolled_back < guard.rollbacks:
        again = f"rolled back to step {best_step}, learning rate times {guard.lr_factor ** (rolled_back + 1):g}"
        return Verdict("roll back", f"{reason}: {again}", change, kept)
    times = f"after {rolled_back} rollback{'s' if rolled_back != 1 else ''}"
    return Verdict("stop", f"{reason}: stopped {times} with the model of step {best_step}", change, kept)


def _percent(change: float) -> str:
    return f"{100 * change:+.2f} %" if math.isfinite(change) else "infinitely worse"
