"""The one training loop, its checkpoints, and supervised training over it."""

from __future__ import annotations

from pykd.training.config import TrainConfig
from pykd.training.finetune import finetune
from pykd.training.guard import Guard
from pykd.training.history import History
from pykd.training.loop import fit

__all__ = ["Guard", "History", "TrainConfig", "finetune", "fit"]
