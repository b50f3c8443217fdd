"""What `compress_to` must reach, and how far a model is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pykd.errors import nearest


class Point(NamedTuple):
    """A measured model: quality 0..1 (None before it was evaluated), bytes of its file, P95 of a call at batch 1."""

    quality: float | None
    size_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Target:
    """Limits, any of them; None is no limit.

    size_mb: 10^6 bytes of the saved weights. ratio: times smaller than the model was. latency_ms: P95 of a call at
    batch 1 on this machine. max_metric_drop: how much lower the accuracy (of other tasks: the quality score) may be, a
    share.

    >>> Target(size_mb=2.0, max_metric_drop=0.01).limits()
    {'size_mb': 2.0, 'max_metric_drop': 0.01}
    """

    size_mb: float | None = None
    ratio: float | None = None
    latency_ms: float | None = None
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        limits = self.limits()
        if not limits:
            raise ValueError(f"a target is one or more of {', '.join(asdict(self))}, got none")
        for name, value in limits.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"target {name} is a number from 0 on, got {value!r}")
            if value == 0 and name != "max_metric_drop":
                raise ValueError(f"target {name} must be above 0, got {value!r}")

    @classmethod
    def of(cls, target: Target | Mapping[str, float]) -> Target:
        """From a mapping such as ``{"size_mb": 2}``. Raises ValueError for an unknown limit or one out of range."""
        if isinstance(target, Target):
            return target
        for name in target:
            if name not in cls.__dataclass_fields__:
                raise ValueError(nearest("target", name, cls.__dataclass_fields__))
        return cls(**target)

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def reached(self, point: Point, base: Point) -> dict[str, float]:
        """What a model reaches of each limit; quality only once it is known."""
        found = {
            "size_mb": point.size_bytes / 1e6,
            "ratio": base.size_bytes / point.size_bytes,
            "latency_ms": point.latency_ms,
        }
        if point.quality is not None and base.quality is not None:
            found["max_metric_drop"] = base.quality - point.quality
        return {name: found[name] for name in self.limits() if name in found}

    def excess(self, point: Point, base: Point) -> dict[str, float]:
        """How far beyond each limit a model is, as a share of it (of the quality: absolutely); 0 or less is met.

        >>> Target(ratio=4).excess(Point(None, 500, 1.0), Point(1.0, 1000, 1.0))
        {'ratio': 1.0}
        """
        limits = self.limits()
        beyond = {}
        for name, value in self.reached(point, base).items():
            if name == "max_metric_drop":
                beyond[name] = value - limits[name] - 1e-12
            else:
                beyond[name] = (limits[name] / value if name == "ratio" else value / limits[name]) - 1
        return beyond
