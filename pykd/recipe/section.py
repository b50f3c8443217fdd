"""What all parts of a recipe have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values do not change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
