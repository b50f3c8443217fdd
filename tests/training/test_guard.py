"""The guard's rule, with numbers: which way is better, what is too much, and what comes after too often."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pykd.evaluation.direction import higher_is_better, improvement, retention
from pykd.training import Guard
from pykd.training.guard import judge


@pytest.mark.parametrize(
    ("metric", "value", "best", "action"),
    [
        ("accuracy", 0.81, 0.80, "best"),
        ("accuracy", 0.80, 0.80, "keep"),
        ("accuracy", 0.7601, 0.80, "keep"),
        ("accuracy", 0.7599, 0.80, "roll back"),
        ("ter", 60.0, 61.0, "best"),
        ("perplexity", 20.9, 20.0, "keep"),
        ("perplexity", 21.1, 20.0, "roll back"),
        ("loss", math.nan, 2.0, "roll back"),
        ("loss", math.inf, 2.0, "roll back"),
        ("f1", 0.1, None, "best"),
        ("errors", 1.0, 0.0, "roll back"),  # worse than none is infinitely worse
        ("accuracy", 0.1, 0.0, "best"),
    ],
)
def test_a_twentieth_of_the_best_may_be_lost(metric: str, value: float, best: float | None, action: str) -> None:
    assert judge(Guard(), metric, value, best).action == action


def test_the_sentence_has_the_numbers() -> None:
    verdict = judge(Guard(rollbacks=2, lr_factor=0.5), "accuracy", 0.6, 0.8, best_step=40, rolled_back=1)
    assert verdict.sentence == (
        "accuracy 0.6 is -25.00 % against the best, 0.8 at step 40, more than 5 %: rolled back to step 40, learning "
        "rate times 0.25"
    )
    assert verdict.change == pytest.approx(-0.25)
    stop = judge(Guard(rollbacks=2), "accuracy", 0.6, 0.8, best_step=40, rolled_back=2)
    assert stop.action == "stop" and stop.sentence.endswith("stopped after 2 rollbacks with the model of step 40")


def test_what_was_kept_of_the_teacher_must_stay_kept() -> None:
    guard = Guard(drop=0.2, teacher=0.9)
    assert judge(guard, "f1", 0.5, 0.6).action == "keep"  # never had nine tenths
    verdict = judge(guard, "f1", 0.8, 0.85, best_step=3)
    assert verdict.action == "roll back" and verdict.retention == pytest.approx(0.8 / 0.9)
    assert "keeps less than 90 %, 88.9 % of the teacher's 0.9" in verdict.sentence
    lower = Guard(drop=0.5, teacher=18.0)
    assert judge(lower, "perplexity", 21.0, 19.0).retention == pytest.approx(18 / 21)
    assert judge(lower, "perplexity", 21.0, 19.0).action == "roll back"
    assert judge(lower, "perplexity", 19.5, 19.0).action == "keep"


def test_signs() -> None:
    assert improvement(0.0, 0.0, higher=True) == 0.0 and improvement(1.0, 0.0, higher=False) == -math.inf
    assert improvement(-1.0, -2.0, higher=True) == 0.5
    assert retention(0.0, 5.0, higher=False) == math.inf and retention(math.nan, 1.0, higher=True) == 0.0
    assert higher_is_better("regret", False) is False
    with pytest.raises(ValueError, match="does not know whether 'regret' is better high or low"):
        higher_is_better("regret")
    with pytest.raises(ValueError, match=r"the teacher's value, which must be above 0, got 0\.0"):
        retention(1.0, 0.0, higher=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"drop": 1.5}, r"drop is a share, 0\.\.1, got 1\.5"),
        ({"retention": -1}, r"retention is a share, 0\.\.1, got -1"),
        ({"lr_factor": 1.0}, r"lr_factor must lie between 0 and 1, got 1\.0"),
        ({"rollbacks": 1.5}, r"rollbacks must be a whole number of at least 0, got 1\.5"),
        ({"metric": "regret"}, "does not know whether 'regret'"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**setting)
