"""Which way a metric improves, and by how much of itself it has changed: the signs that guards and scores go by."""

from __future__ import annotations

import math

#: Metric -> True where a higher value is better.
HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "bertscore": True,
    "bleu": True,
    "chrf": True,
    "f1": True,
    "precision": True,
    "recall": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
    "score": True,
    "errors": False,
    "loss": False,
    "perplexity": False,
    "ter": False,
}


def higher_is_better(metric: str, known: bool | None = None) -> bool:
    """Whether a metric improves by rising; ``known`` answers for names that are not in ``HIGHER_IS_BETTER``.

    Raises ValueError for a name that is not there, without that answer.

    >>> higher_is_better("f1"), higher_is_better("perplexity"), higher_is_better("regret", False)
    (True, False, False)
    """
    if known is not None:
        return known
    if metric not in HIGHER_IS_BETTER:
        raise ValueError(
            f"pykd does not know whether {metric!r} is better high or low: say so with higher_is_better=True or False"
        )
    return HIGHER_IS_BETTER[metric]


def improvement(now: float, before: float, *, higher: bool) -> float:
    """By which share of ``before`` a metric has become better; below 0: worse. Anything worse than 0 is infinitely so.

    A value that is not finite is infinitely worse.

    >>> improvement(0.9, 1.0, higher=True), improvement(110.0, 100.0, higher=False)
    (-0.09999999999999998, -0.1)
    """
    if not math.isfinite(now):
        return -math.inf
    gain = now - before if higher else before - now
    if gain == 0:
        return 0.0
    return gain / abs(before) if before else math.copysign(math.inf, gain)


def retention(now: float, teacher: float, *, higher: bool) -> float:
    """How much of the teacher's quality is kept: ``now / teacher``, or ``teacher / now`` where lower is better.

    1 is the teacher's quality, more is better than the teacher. Raises ValueError for a metric that is not positive
    where it is divided by.

    >>> retention(0.81, 0.9, higher=True), retention(20.0, 18.0, higher=False)
    (0.9, 0.9)
    """
    if not math.isfinite(now):
        return 0.0
    if not higher and now == 0:
        return 1.0 if teacher == 0 else math.inf
    if higher and teacher <= 0:
        raise ValueError(f"retention is a share of the teacher's value, which must be above 0, got {teacher}")
    return now / teacher if higher else teacher / now
