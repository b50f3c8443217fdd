"""What one training run is: the numbers that, with the data and the first weights, decide every weight it ends with."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pykd.errors import nearest

#: Mixed-precision types the loop offers. bfloat16 has the range of float32; with float16 the loss is scaled.
AUTOCAST: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :func:`pykd.training.fit`: AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay.

    epochs: passes over the training set, > 0; may be a fraction. ``max_steps`` (optimizer steps), when given, wins.
    lr: highest learning rate, reached after ``warmup_ratio`` (0..1) of the steps; the last step's is almost zero.
    weight_decay: per step and unit of lr; biases and normalisation weights are not decayed.
    clip_norm: gradients are scaled so that their global L2 norm is at most this; None leaves them alone.
    batch_size: examples that one process passes through the model at once. accumulate: how many such batches make a
    step; they count as one batch to the last digit that rounding leaves, whatever number of labels each of them has.
    autocast: "bfloat16" or "float16" runs forward and loss in mixed precision; None keeps the model's own type.
    gradient_checkpointing: compute activations again in the backward pass instead of keeping them (Chen et al. 2016).
    group_by_length: put examples of similar length into a batch, so that less of it is padding.
    seed: decides data order and dropout, a function of (seed, step), never of what ran before.
    checkpoint_steps: steps between checkpoints; None writes one at the end of every epoch. keep_checkpoints: how many
    of the newest stay. validate_steps: steps between validations; None validates at the end of every epoch.

    >>> TrainConfig(epochs=2, lr=1e-3).to_dict()["epochs"]
    2
    """

    epochs: float = 1.0
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    clip_norm: float | None = 1.0
    autocast: str | None = None
    seed: int = 0
    max_steps: int | None = None
    checkpoint_steps: int | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    validate_steps: int | None = None
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0.0), ("lr", 0.0), ("clip_norm", 0.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > low):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        for name in ("batch_size", "max_steps", "checkpoint_steps", "accumulate", "validate_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {self.weight_decay!r}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is the share of steps that warm up, 0..1, got {self.warmup_ratio!r}")
        if self.autocast is not None and self.autocast not in AUTOCAST:
            raise ValueError(nearest("autocast", self.autocast, AUTOCAST))

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values for a report or a checkpoint."""
        return asdict(self)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or max(1, math.ceil(self.epochs * steps_per_epoch))


def learning_rate(step: int, total: int, *, peak: float, warmup_ratio: float) -> float:
    """Learning rate of one step: linear warm-up, then half a cosine to zero (SGDR, Loshchilov & Hutter 2017, eq. 5).

    step counts from 0 to total - 1; the first ``round(warmup_ratio * total)`` steps climb to ``peak``.

    >>> [round(learning_rate(s, 4, peak=1.0, warmup_ratio=0.25), 2) for s in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    warmup = round(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))
