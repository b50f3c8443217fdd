"""What a study weighs and searches."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pykd.recipe.section import Section


class Weights(Section):
    """What counts how much when students are ranked."""

    quality: float = Field(default=0.6, ge=0, description="accuracy, or the task's quality score")
    speed: float = Field(default=0.2, ge=0, description="at batch 1")
    size: float = Field(default=0.2, ge=0, description="bytes on disk")
    explanations: float = Field(default=0.0, ge=0, description="likeness of attributions to the teacher's")


class Study(Section):
    """How `pykd study` ranks the students of a chain."""

    weights: Weights = Field(default_factory=Weights, description="of each student's share of the best one's value")
    explain: int = Field(default=0, ge=0, description="examples whose attributions are compared with the teacher's")

    @model_validator(mode="after")
    def _can_be_ranked(self) -> Study:
        """What the ranking would find out only after the trainings."""
        if self.weights.explanations > 0 and not self.explain:
            raise ValueError("study.weights.explanations needs explanations: set study.explain above 0, or weigh it 0")
        if not any(self.weights.model_dump().values()):
            raise ValueError("study.weights: at least one weight must be above 0")
        return self


class Range(Section):
    """Numbers to choose from: whole ones where both ends are whole."""

    low: int | float
    high: int | float
    log: bool = Field(default=False, description="by their logarithm, as learning rates are")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            above = ", and log one above 0" if self.log else ""
            raise ValueError(f"a range needs low below high{above}, got {self.low} to {self.high}")
        return self

    @property
    def whole(self) -> bool:
        """Whether both ends are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Choice = bool | int | float | str | None


class Search(Section):
    """Which values of which keys are tried, by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    values: dict[str, Range | list[Choice]] = Field(
        min_length=1, description="path of a key, as stages[0].distill.lr -> its range, or a list of choices"
    )
    trials: int = Field(default=20, ge=1, description="runs; the first has the recipe's own values")
    weights: Weights = Field(
        default_factory=lambda: Weights(quality=1.0, speed=0.0, size=0.0),
        description="of a trial's quality as a share of the teacher's, of the bytes it saves, and of the time it saves",
    )
    short: dict[str, Any] = Field(default_factory=dict, description="dotted keys that are set in trials alone")

    @model_validator(mode="after")
    def _can_be_scored(self) -> Search:
        if self.weights.explanations > 0:
            raise ValueError("search.weights: explanations are not measured in trials, weigh them 0")
        if self.weights.quality + self.weights.speed + self.weights.size <= 0:
            raise ValueError("search.weights: at least one weight must be above 0")
        for key, choices in self.values.items():
            if isinstance(choices, list) and len(choices) < 2:
                raise ValueError(f"search.values.{key}: a list of choices needs two or more, got {choices}")
        return self
