"""Sparsity that rises during a training."""

from __future__ import annotations

from pydantic import Field, model_validator

from pykd.pruning import Gradual
from pykd.recipe.section import PatternText, Section


class GradualPruning(Section):
    """Prune while the stage trains, as :class:`pykd.pruning.Gradual` does."""

    method: str = Field("magnitude", description="magnitude, movement or random")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of the weights removed in the end: 0.5 by default"
    )
    initial: float = Field(0.0, description="sparsity to begin with")
    begin: float = Field(0.0, description="share of the steps after which it rises")
    end: float = Field(0.7, description="share of the steps after which it stays, and the rest recovers")
    every: int = Field(10, description="steps from one choice of weights to the next")
    scope: str | None = Field(None, description="the weights over which the share is met: global, layer or row")
    pattern: PatternText = Field(None, description="N:M, as 2:4: N weights kept of M neighbours")
    include: list[str] | None = Field(None, description="name patterns of the layers to touch")
    exclude: list[str] | None = Field(None, description="name patterns of the layers to leave")

    @model_validator(mode="after")
    def _in_range(self) -> GradualPruning:
        self.gradual(0)
        return self

    def gradual(self, seed: int) -> Gradual:
        """The same numbers as the training takes them; ValueError for ones that do not go together."""
        return Gradual(**{name: getattr(self, name) for name in GradualPruning.model_fields}, seed=seed)
