"""How much of what pruning cost a recovery won back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pykd.evaluation import Report


class Recovery(NamedTuple):
    """Quality before pruning, after it, and after the recovery; share: of the loss that was won back, None where
    pruning cost nothing. It is above 1 where the recovered model is better than the one before."""

    name: str
    before: float
    pruned: float
    recovered: float

    @property
    def share(self) -> float | None:
        """(recovered - pruned) / (before - pruned)."""
        cost = self.before - self.pruned
        return (self.recovered - self.pruned) / cost if cost > 0 else None

    def sentence(self) -> str:
        """The same in words.

        >>> Recovery("recover", 0.75, 0.5, 0.7).sentence()
        'recover won back 80 % of what pruning cost: quality 0.7500 before, 0.5000 pruned, 0.7000 now'
        """
        course = f"quality {self.before:.4f} before, {self.pruned:.4f} pruned, {self.recovered:.4f} now"
        if self.share is None:
            return f"pruning before {self.name} cost nothing: {course}"
        if self.share > 1:
            return f"{self.name} won back all that pruning cost, and more: {course}"
        verb = "won back" if self.share >= 0 else "lost another"
        return f"{self.name} {verb} {abs(100 * self.share):.0f} % of what pruning cost: {course}"


def recoveries(stages: Sequence[tuple[str, Report]]) -> list[Recovery]:
    """One for each `recover` that follows one `prune` or several; stages: kind and report, in order, the teacher first.

    Quality is `Report.quality`: the accuracy of classes, else the quality score.
    """
    found = []
    for index, (kind, report) in enumerate(stages):
        first = index
        while stages[first - 1][0] == "prune":
            first -= 1
        if kind == "recover" and first < index:
            before, pruned = stages[first - 1][1], stages[index - 1][1]
            found.append(Recovery(report.name, before.quality(), pruned.quality(), report.quality()))
    return found
