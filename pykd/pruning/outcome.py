"""What a pruning method is asked for and what it tells about its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Request:
    """sparsity: share to remove, [0, 1). include, exclude: name patterns. example: a batch the model accepts.

    rows: the numbers of rows for which sparse layers choose how they compute; None leaves that to thresholds.
    """

    sparsity: float
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    example: Tensor | dict[str, Tensor] | None = None
    rows: Sequence[int] | None = None


@dataclass
class Outcome:
    """changed: layer or block -> what became of it; skipped: layer or block -> why it was left alone."""

    changed: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


Method = Callable[[nn.Module, Request], Outcome]
