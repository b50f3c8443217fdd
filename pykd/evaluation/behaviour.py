"""How a compressed model behaves beside the one it came from, beyond how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykd.evaluation.examples import flips
from pykd.evaluation.intervals import PairedTest, paired_test
from pykd.evaluation.report import Report

#: Bins of confidence of the calibration error (Guo et al. 2017 use 15), and of the agreement by confidence.
CALIBRATION_BINS, AGREEMENT_BINS = 15, 5


@dataclass(frozen=True)
class ConfidenceBin:
    """Examples on which the baseline's confidence lies in [low, high), the last one with its end; agreement 0..1."""

    low: float
    high: float
    examples: int
    agreement: float


@dataclass(frozen=True)
class Behaviour:
    """A model against a baseline on the same examples. Shares and errors are 0..1.

    flip_rate: share of predictions that changed. lost: examples that the baseline alone has right; won: the reverse.
    calibration_error, baseline_calibration_error: expected calibration error of each. worst_class: the class whose
    recall fell most, by worst_class_drop; empty where there are no classes or none fell. test: of the examples' scores,
    named ``score``.
    """

    flip_rate: float
    lost: int
    won: int
    calibration_error: float
    baseline_calibration_error: float
    worst_class: str
    worst_class_drop: float
    agreement_by_confidence: tuple[ConfidenceBin, ...]
    test: PairedTest
    score: str


def behaviour(report: Report, baseline: Report) -> Behaviour:
    """Compare the answers of two models example by example.

    Raises ValueError when they were measured on different test sets.
    """
    agreement = report.agreement(baseline)
    lost, won = flips(report, baseline)
    drops = [
        (before.recall - now.recall, now.name)
        for now, before in zip(report.per_class, baseline.per_class, strict=True)
        if now.support
    ]
    drop, name = max(drops, default=(0.0, ""))
    return Behaviour(
        flip_rate=1.0 - agreement,
        lost=lost,
        won=won,
        calibration_error=calibration_error(report),
        baseline_calibration_error=calibration_error(baseline),
        worst_class=name if drop > 0 else "",
        worst_class_drop=max(0.0, drop),
        agreement_by_confidence=_by_confidence(report, baseline),
        test=paired_test(report.scores(), baseline.scores()),
        score=report.example_score,
    )


def calibration_error(report: Report, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Naeini et al. 2015): sum over bins of (share) * |accuracy - mean confidence|, 0..1.

    The bins are equally wide in confidence, the probability that the model gave its prediction.
    """
    total, error = len(report.labels), 0.0
    for rows in _bins(report.confidences, bins):
        if rows:
            right = sum(report.labels[row] == report.predictions[row] for row in rows)
            error += abs(right - sum(report.confidences[row] for row in rows)) / total
    return error


def _by_confidence(report: Report, baseline: Report) -> tuple[ConfidenceBin, ...]:
    found = []
    for number, rows in enumerate(_bins(baseline.confidences, AGREEMENT_BINS)):
        same = sum(report.predictions[row] == baseline.predictions[row] for row in rows)
        if rows:
            ends = number / AGREEMENT_BINS, (number + 1) / AGREEMENT_BINS
            found.append(ConfidenceBin(*ends, len(rows), same / len(rows)))
    return tuple(found)


def _bins(confidences: Sequence[float], bins: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(bins)]
    for row, confidence in enumerate(confidences):
        rows[min(bins - 1, int(confidence * bins))].append(row)
    return rows
