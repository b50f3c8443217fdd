"""What a recipe says of the dual-branch router: how the student is made, and where its threshold is drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pykd.recipe.section import Section


class Router(Section):
    """A student with a shared encoder, a fast and a deep branch, made of the teacher's layers (pykd.models.router)."""

    shared_layers: int | None = Field(None, ge=1, description="first layers of the teacher; none: half of them")
    deep_layers: int | None = Field(None, ge=1, description="layers of the deep branch; none: all others")
    experts: int = Field(4, ge=0, description="feed-forward networks in each deep layer; 0: one dense network")
    experts_per_token: int = Field(2, ge=1, description="experts that each token goes through")
    expert_size: int | None = Field(None, ge=1, description="neurons of an expert; none: the teacher's")
    routing: Literal["learned", "fast", "deep"] = Field("learned", description="fast or deep: that branch alone")
    deep_share: float = Field(0.3, gt=0, lt=1, description="share of the rows that the deep branch is meant for")
    load_weight: float = Field(0.3, ge=0, description="of the loss that keeps that share while training")
    balance_weight: float = Field(0.01, ge=0, description="of the loss that has all experts used")

    @model_validator(mode="after")
    def _enough_experts(self) -> Router:
        if 0 < self.experts < self.experts_per_token:
            raise ValueError(
                f"each token goes through {self.experts_per_token} of {self.experts} experts: lower experts_per_token, "
                "or take more experts"
            )
        return self


class Calibrate(Section):
    """Draw the router's threshold so that a share of held-out rows goes deep. Labels are not looked at."""

    deep_share: float | None = Field(None, gt=0, lt=1, description="none: as the student was made for")
    samples: int = Field(512, ge=2, description="held-out rows, chosen by the seed")
    batch_size: int = Field(64, ge=1, description="of them at once")
