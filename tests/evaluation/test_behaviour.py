"""What differs between the answers of two models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykd.evaluation import Report, compare
from pykd.evaluation.behaviour import behaviour, calibration_error
from pykd.evaluation.comparison import pareto_front

Make = Callable[..., Report]


def test_answers_beside_the_baselines(make_report: Make) -> None:
    before, now = make_report(wrong=1), make_report("pruned", wrong=4)
    found = behaviour(now, before)
    assert (found.lost, found.won, found.flip_rate) == (3, 0, pytest.approx(3 / 12))
    assert found.worst_class == "c" and found.worst_class_drop == pytest.approx(1 / 4)
    assert found.test.difference == pytest.approx(-3 / 12) and not found.test.significant
    assert found.test.method == "McNemar's exact test, 0 against 3" and found.score == "right answers"


def test_nothing_changed_nothing_fell(make_report: Make) -> None:
    found = behaviour(make_report("again"), make_report())
    assert (found.flip_rate, found.worst_class, found.worst_class_drop, found.test.p_value) == (0, "", 0, 1)


def test_calibration_is_the_distance_of_confidence_from_truth(make_report: Make) -> None:
    assert calibration_error(make_report(wrong=0, confidences=(1.0,) * 12)) == 0
    assert calibration_error(make_report(wrong=6, confidences=(1.0,) * 12)) == pytest.approx(0.5)
    halves = (0.95,) * 6 + (0.55,) * 6
    assert calibration_error(make_report(wrong=6, confidences=halves)) == pytest.approx(0.5 * 0.95 + 0.5 * 0.45)


def test_agreement_by_the_baselines_confidence(make_report: Make) -> None:
    before = make_report(wrong=0, confidences=(0.3,) * 4 + (1.0,) * 8)
    unsure, sure = behaviour(make_report("now", wrong=2), before).agreement_by_confidence
    assert (unsure.low, unsure.high, unsure.examples, unsure.agreement) == (0.2, 0.4, 4, 0.5)
    assert (sure.high, sure.examples, sure.agreement) == (1.0, 8, 1.0)


def test_other_examples_have_no_behaviour(make_report: Make) -> None:
    other = make_report("other", labels=(0,) * 12)
    with pytest.raises(ValueError, match="measured on different examples"):
        behaviour(other, make_report())
    assert compare([make_report(), other]).behaviours == (None, None)


def test_a_comparison_knows_its_front_and_behaviours(make_report: Make) -> None:
    worse = make_report("worse", wrong=3, size_bytes=5_000_000, latency_p50_ms=11.0)
    small = make_report("small", wrong=3, size_bytes=1_000_000)
    found = compare([make_report(), worse, small])
    assert found.front == (0, 2) and found.to_dict()["front"] == ["teacher", "small"]
    assert found.behaviours[0] is None and found.to_dict()["behaviours"]["worse"]["lost"] == 2
    assert [row[0] for row in found.behaviour_cells()] == ["model", "worse", "small"]
    assert "| worse |" in found.markdown() and compare([make_report()]).behaviour_cells() == []


def test_a_front_keeps_equals() -> None:
    assert pareto_front([(1.0, 1.0), (1.0, 1.0), (0.5, 2.0), (0.5, 1.5)]) == (0, 1, 2)
