"""What a pruning method is asked for and what it tells about its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pykd.calibration import Batch, Data, calibration_batches
from pykd.errors import DataError
from pykd.nn.importance import Block, Pattern


@dataclass(frozen=True)
class Request:
    """sparsity: share to remove, [0, 1). include, exclude: name patterns. example: a batch the model accepts.

    rows: the numbers of rows for which sparse layers choose how they compute; None leaves that to thresholds.
    scope: the weights over which the share is met, "global", "layer" or "row"; None is the method's own choice.
    pattern: so many weights kept of so many neighbours, or blocks of weights that go together. importance: how whole
    units are scored.
    data, samples, batch_size: the examples for methods that look at some. seed: which, and every other draw.
    """

    sparsity: float
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    example: Tensor | dict[str, Tensor] | None = None
    rows: Sequence[int] | None = None
    scope: str | None = None
    pattern: Pattern | Block | None = None
    importance: str = "l2"
    data: Data | None = None
    samples: int = 256
    batch_size: int = 16
    seed: int = 0

    def batches(self, method: str) -> list[Batch]:
        """The examples that were given; DataError when there are none."""
        if self.data is None:
            raise DataError(f"{method} looks at examples: pass data=, some hundred of what the model is for")
        return calibration_batches(self.data, samples=self.samples, batch_size=self.batch_size, seed=self.seed)


@dataclass
class Outcome:
    """changed: layer or block -> what became of it; skipped: layer or block -> why it was left alone.

    units: names that lose their channels or heads together, so that whoever excludes one excludes all of them; empty
    where each name of ``changed`` stands by itself.
    """

    changed: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    units: list[list[str]] = field(default_factory=list)


Method = Callable[[nn.Module, Request], Outcome]
