"""What a stage must not lose."""

from __future__ import annotations

from pydantic import Field, model_validator

from pykd.recipe.section import Section
from pykd.training import Guard


class Guarded(Section):
    """The quality guard of a stage: :class:`pykd.training.Guard` without the teacher's value, and what to do."""

    metric: str | None = Field(None, description="None takes the first of the task: accuracy of classes")
    higher_is_better: bool | None = None
    drop: float = Field(0.05, description="share of the best, or of the stage before, that may be lost")
    retention: float = Field(0.9, description="share of the teacher's value that must be kept, once reached")
    rollbacks: int = Field(2, description="training: times back to the best checkpoint before it ends early")
    lr_factor: float = Field(0.3, description="training: what the learning rate is multiplied by each time")
    bisect: bool = Field(True, description="pruning, quantization: leave out the layers that do harm; false undoes all")

    @model_validator(mode="after")
    def _in_range(self) -> Guarded:
        self.guard()
        return self

    def guard(self) -> Guard:
        """The same numbers as the training loop takes them; ValueError for one that is out of range."""
        return Guard(**{name: getattr(self, name) for name in Guarded.model_fields if name != "bisect"})
