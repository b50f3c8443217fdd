"""What changes a model's sparsity while it is trained: the loop knows this much of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class Pruner(Protocol):
    """Sparsity that rises during a training; `pykd.pruning.Gradual` is one."""

    def attach(self, model: nn.Module) -> None:
        """Make the layers of a model maskable, in place."""

    def step(self, model: nn.Module, number: int, total: int) -> dict[str, float]:
        """Set the masks for step ``number`` (from 0) of ``total``; what to note of the step. A function of the model's
        state and these numbers alone, so that an interrupted training continues bit for bit."""

    def settled(self, steps: int, total: int) -> bool:
        """Whether the sparsity is the final one once so many steps of ``total`` are done."""

    def detach(self, model: nn.Module) -> None:
        """Make the layers sparse for good, in place, and record it."""

    def to_dict(self) -> dict[str, Any]:
        """The settings: a checkpoint of other settings is refused."""


@contextlib.contextmanager
def attached(pruner: Pruner | None, model: nn.Module) -> Iterator[None]:
    """The model maskable inside, and sparse afterwards, even after an error or Ctrl-C."""
    if pruner is None:
        yield
        return
    pruner.attach(model)
    try:
        yield
    finally:
        pruner.detach(model)
