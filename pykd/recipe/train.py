"""The numbers of one training."""

from __future__ import annotations

from pydantic import model_validator

from pykd.recipe.section import Section
from pykd.training import TrainConfig


class Train(Section):
    """Settings of one training: the fields of :class:`pykd.training.TrainConfig` but the seed, which the recipe has."""

    epochs: float = 1.0
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    clip_norm: float | None = 1.0
    autocast: str | None = None
    max_steps: int | None = None
    checkpoint_steps: int | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    validate_steps: int | None = None
    keep_checkpoints: int = 1

    @model_validator(mode="after")
    def _in_range(self) -> Train:
        self.train_config(0)
        return self

    def train_config(self, seed: int) -> TrainConfig:
        """The same numbers as the training loop takes them; ValueError for one that is out of range."""
        return TrainConfig(**{name: getattr(self, name) for name in Train.model_fields}, seed=seed)
