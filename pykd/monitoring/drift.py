"""Whether recent values are distributed as those of a baseline: how much they differ, and whether that may be chance.

The population stability index says how much, the two-sample Kolmogorov-Smirnov test (for classes the law of the index
itself) whether it may be chance. An alarm needs both: few rows differ much by chance, many rows differ surely but by
nothing that matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Bins of equal shares of the baseline, for the index of numbers.
BINS = 10
Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Thresholds:
    """From when on something is an alarm.

    psi: the index from which a distribution counts as another one (0.1 is small, 0.25 large by common use). p_value:
    below it, chance is ruled out. window: rows that are compared, the newest. minimum: rows before anything is said.
    accuracy, f1: shares (0..1) below which quality is an alarm, None for none. minimum_labels: true labels before
    anything is said. Raises ValueError for values out of range.
    """

    psi: float = 0.25
    p_value: float = 1e-3
    window: int = 500
    minimum: int = 100
    accuracy: float | None = None
    f1: float | None = None
    minimum_labels: int = 50

    def __post_init__(self) -> None:
        for name in ("psi", "p_value"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("accuracy", "f1"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {value!r}")
        if not 1 <= self.minimum <= self.window or self.minimum_labels < 1:
            raise ValueError(
                f"expected 1 <= minimum <= window and minimum_labels >= 1, got minimum={self.minimum}, "
                f"window={self.window}, minimum_labels={self.minimum_labels}"
            )


@dataclass(frozen=True)
class Drift:
    """One quantity of a window against the baseline. ks: None for classes. p_value: of no difference."""

    quantity: str
    rows: int
    psi: float
    ks: float | None
    p_value: float
    alarm: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """What an alarm says."""
        ks = "" if self.ks is None else f", KS {self.ks:.3f}"
        return f"{self.quantity} has shifted: PSI {self.psi:.3f}{ks} over {self.rows} rows (p {self.p_value:.1e})"


def cut_points(values: ArrayLike, bins: int = BINS) -> Numbers:
    """Where to cut so that each bin holds an equal share of ``values``; a value that fills bins gets one of its own.

    >>> cut_points([1.0, 2.0, 3.0, 4.0], bins=2)
    array([2.5])
    >>> histogram([6.0, 7.0, 7.0, 8.0], cut_points([7.0] * 20))
    array([1, 2, 1])
    """
    cuts = np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, bins + 1)[1:-1])
    repeated = cuts[1:][cuts[1:] == cuts[:-1]]
    return np.unique(np.concatenate([cuts, np.nextafter(repeated, np.inf)]))


def histogram(values: ArrayLike, cuts: Numbers) -> Counts:
    """Rows in each bin: the first below the first cut, the last from the last cut on."""
    bins = np.searchsorted(cuts, np.asarray(values, dtype=np.float64), side="right")
    return np.bincount(bins, minlength=len(cuts) + 1)


def stability_index(expected: ArrayLike, actual: ArrayLike) -> float:
    """Population stability index of two histograms: sum over bins of (a - e) ln(a / e), a symmetric KL divergence.

    expected, actual: rows in the same bins. Shares are of counts plus a half, so that empty bins stay finite. At least
    0, and 0 for equal shares. Raises ValueError for histograms of different bins, or without rows.

    >>> stability_index([50, 50], [50, 50])
    0.0
    >>> round(stability_index([50, 50], [80, 20]), 2)
    0.41
    """
    e, a = np.asarray(expected, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if e.shape != a.shape or e.ndim != 1 or not e.sum() or not a.sum():
        raise ValueError(f"expected two histograms of the same bins with rows in both, got {e.tolist()}, {a.tolist()}")
    e, a = (e + 0.5) / (e + 0.5).sum(), (a + 0.5) / (a + 0.5).sum()
    return float(((a - e) * np.log(a / e)).sum())


def stability_p_value(index: float, expected_rows: int, actual_rows: int, bins: int) -> float:
    """How likely such an index is without a shift: psi * n m / (n + m) is chi-squared, bins - 1 (Yurdakul 2018).

    >>> stability_p_value(0.0, 100, 100, 3)
    1.0
    """
    if bins < 2:
        return 1.0
    from scipy.stats import chi2

    return float(chi2.sf(index * expected_rows * actual_rows / (expected_rows + actual_rows), bins - 1))


def kolmogorov_smirnov(expected: ArrayLike, actual: ArrayLike) -> tuple[float, float]:
    """Largest distance (0..1) of two empirical distributions, and the p-value of no difference (scipy).

    The p-value is asymptotic; 1 where a sample is too small for it (n m / (n + m) rounds to 0).

    Raises ValueError for a sample without values.

    >>> kolmogorov_smirnov([1, 2, 3], [4, 5, 6])[0]
    1.0
    """
    from scipy.stats import ks_2samp

    if not np.size(expected) or not np.size(actual):
        raise ValueError(f"expected two samples with values, got {np.size(expected)} and {np.size(actual)}")
    n, m = np.size(expected), np.size(actual)
    with np.errstate(divide="ignore"):
        found = ks_2samp(np.asarray(expected), np.asarray(actual), method="asymp")
    return float(found.statistic), float(found.pvalue) if round(n * m / (n + m)) else 1.0


def number_drift(name: str, expected: Sequence[float], actual: Sequence[float], thresholds: Thresholds) -> Drift:
    """Drift of a quantity that is a number: index over the deciles of ``expected``, and the KS test."""
    cuts = cut_points(expected)
    psi = stability_index(histogram(expected, cuts), histogram(actual, cuts))
    ks, p_value = kolmogorov_smirnov(expected, actual)
    return Drift(name, len(actual), psi, ks, p_value, psi >= thresholds.psi and p_value < thresholds.p_value)


def label_drift(expected: Mapping[str, int], actual: Mapping[str, int], thresholds: Thresholds) -> Drift:
    """Drift of the predicted classes, from how often each was predicted."""
    names = sorted({*expected, *actual})
    before, now = ([counts.get(name, 0) for name in names] for counts in (expected, actual))
    psi = stability_index(before, now)
    p_value = stability_p_value(psi, sum(before), sum(now), len(names))
    return Drift("label", sum(now), psi, None, p_value, psi >= thresholds.psi and p_value < thresholds.p_value)
