"""What all parts of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values do not change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _not_a_time(pattern: object) -> object:
    """YAML 1.1 reads 2:4 as a number to the base 60."""
    return f"{pattern // 60}:{pattern % 60}" if isinstance(pattern, int) else pattern


#: A pattern of sparsity as N:M, with quotes or without.
PatternText = Annotated[str | None, BeforeValidator(_not_a_time)]
