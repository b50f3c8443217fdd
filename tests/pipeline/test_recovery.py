"""What a recovery won back: whole lines of stages, and those in which there is nothing to win."""

from __future__ import annotations

from typing import Any

import pytest

from pykd.pipeline.recovery import Recovery, recoveries


class Measured:
    """As much of a report as the comparison reads."""

    def __init__(self, name: str, quality: float) -> None:
        self.name, self.value = name, quality

    def quality(self) -> float:
        return self.value


def line(*stages: tuple[str, float]) -> list[Any]:
    return [(kind, Measured(f"{number}-{kind}", value)) for number, (kind, value) in enumerate(stages)]


def test_a_recovery_is_measured_against_all_pruning_since_the_stage_before() -> None:
    stages = line(
        ("teacher", 0.9), ("distill", 0.8), ("prune", 0.7), ("prune", 0.6), ("recover", 0.75), ("prune", 0.65),
        ("recover", 0.6), ("quantize", 0.6), ("recover", 0.9),
    )  # fmt: skip
    first, second = recoveries(stages)
    assert first == ("4-recover", 0.8, 0.6, 0.75) and second == ("6-recover", 0.75, 0.65, 0.6)
    assert first.share == pytest.approx(0.75) and second.share == pytest.approx(-0.5)
    assert first.sentence().startswith(
        "4-recover won back 75 % of what pruning cost: quality 0.8000 before, 0.6000 pru"
    )
    assert second.sentence().startswith("6-recover lost another 50 % of what pruning cost")


def test_pruning_that_cost_nothing_has_no_share() -> None:
    free = Recovery("recover", 0.7, 0.71, 0.72)
    assert free.share is None
    assert free.sentence() == "pruning before recover cost nothing: quality 0.7000 before, 0.7100 pruned, 0.7200 now"
    assert recoveries(line(("teacher", 0.9), ("recover", 0.9))) == []


def test_more_than_all_is_said_in_words() -> None:
    assert Recovery("recover", 0.31, 0.308, 0.336).sentence() == (
        "recover won back all that pruning cost, and more: quality 0.3100 before, 0.3080 pruned, 0.3360 now"
    )
