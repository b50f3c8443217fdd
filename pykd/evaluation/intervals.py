"""How sure a number is: confidence intervals of metrics, and paired tests of two models on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
#: Metric -> (lower, upper) end of its confidence interval.
Intervals = dict[str, tuple[float, float]]
#: How often each example was drawn -> the metrics of that sample.
Statistic = Callable[[Counts], Mapping[str, float]]

#: Samples that an interval is read from, and the share of them inside it.
RESAMPLES, CONFIDENCE = 1000, 0.95
#: Random swaps of a permutation test.
SWAPS = 2000


def bootstrap(
    statistic: Statistic, examples: int, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Intervals:
    """Percentile bootstrap over examples (Efron 1979): whole examples are drawn again, with replacement.

    statistic: from how often each of the ``examples`` was drawn, (examples,), to metrics. confidence: share (0, 1) of
    the resampled values inside the interval. A metric that is infinite or NaN in a sample counts as it is.

    Raises ValueError for no examples, or numbers out of range.

    >>> right = np.array([1.0] * 90 + [0.0] * 10)
    >>> low, high = bootstrap(lambda n: {"accuracy": float(n @ right / n.sum())}, 100)["accuracy"]
    >>> 0.8 < low < 0.9 < high < 1.0
    True
    """
    if examples < 1 or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap needs examples, resamples and a confidence in (0, 1), got {examples}, {resamples}, {confidence}"
        )
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        counts = np.bincount(random.integers(examples, size=examples), minlength=examples).astype(np.float64)
        for name, value in statistic(counts).items():
            drawn.setdefault(name, []).append(value)
    ends = (50 * (1 - confidence), 50 * (1 + confidence))
    found = {name: np.percentile(values, ends, method="nearest") for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def class_statistic(labels: Sequence[int], predictions: Sequence[int], classes: int) -> Statistic:
    """Accuracy and macro precision, recall, F1 of class predictions, as :func:`pykd.evaluation.metrics.quality`."""
    cells = np.asarray(labels) * classes + np.asarray(predictions)

    def statistic(counts: Counts) -> dict[str, float]:
        confusion = np.bincount(cells, weights=counts, minlength=classes * classes).reshape(classes, classes)
        right, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        occurring = labelled + predicted > 0
        means = (right / np.maximum(predicted, 1), right / np.maximum(labelled, 1), 2 * right / (labelled + predicted))
        precision, recall, f1 = (float(each[occurring].mean()) for each in means)
        return {"accuracy": float(right.sum() / counts.sum()), "precision": precision, "recall": recall, "f1": f1}

    def quiet(counts: Counts) -> dict[str, float]:
        with np.errstate(invalid="ignore"):  # 0 / 0 of classes that do not occur, which the means leave out
            return statistic(counts)

    return quiet


def language_statistic(nll: Sequence[float], right: Sequence[int], tokens: Sequence[int]) -> Statistic:
    """Perplexity and accuracy of tokens; of each example: sum of -log p, right tokens, counted tokens."""
    sums = np.array([nll, right, tokens], dtype=np.float64)

    def statistic(counts: Counts) -> dict[str, float]:
        loss, hits, all_tokens = sums @ counts
        with np.errstate(over="ignore"):
            return {
                "perplexity": float(np.exp(loss / max(1.0, all_tokens))),
                "accuracy": float(hits / max(1.0, all_tokens)),
            }

    return statistic


def entity_statistic(found: Sequence[tuple[int, int, int]], right: Sequence[int], tags: Sequence[int]) -> Statistic:
    """Micro precision, recall, F1 of entities and the share of right tags.

    found: of each sentence (right entities, predicted entities, labelled entities); right, tags: its right tags, all.
    """
    sums = np.concatenate([np.asarray(found, dtype=np.float64).T, np.array([right, tags], dtype=np.float64)])

    def statistic(counts: Counts) -> dict[str, float]:
        hits, predicted, labelled, right_tags, all_tags = sums @ counts
        return {
            "accuracy": float(right_tags / max(1.0, all_tags)),
            "precision": float(hits / max(1.0, predicted)),
            "recall": float(hits / max(1.0, labelled)),
            "f1": float(2 * hits / max(1.0, predicted + labelled)),
        }

    return statistic


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same examples. difference: mean score of the one minus that of the other, in the score's unit.

    low, high: its 95 % interval by bootstrap over examples. p_value: of no difference, 0..1, two-sided.
    """

    difference: float
    low: float
    high: float
    p_value: float
    method: str

    @property
    def significant(self) -> bool:
        """Whether the difference is told from chance at the 5 % level."""
        return self.p_value < 0.05


def paired_test(scores: Sequence[float], baseline: Sequence[float], *, seed: int = 0) -> PairedTest:
    """Whether two models differ, from a score of each on each example.

    For scores that are 0 or 1 McNemar's exact test (1947): a binomial test of the examples that one of them alone has
    right. For others a permutation test that swaps the models' scores, example by example (Fisher 1935; SWAPS of them).
    Raises ValueError for different numbers of examples, or none.

    >>> paired_test([1, 1, 1, 1, 0], [1, 1, 1, 1, 0]).p_value
    1.0
    """
    from scipy import stats

    now, before = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if now.shape != before.shape or not len(now):
        raise ValueError(f"a paired test needs both models' scores of the same examples, got {len(now)}, {len(before)}")
    change = now - before
    interval = bootstrap(lambda counts: {"": float(counts @ change / counts.sum())}, len(change), seed=seed)[""]
    if np.isin(now, (0, 1)).all() and np.isin(before, (0, 1)).all():
        won, lost = int((change > 0).sum()), int((change < 0).sum())
        p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
        method = f"McNemar's exact test, {won} against {lost}"
    else:
        random = np.random.default_rng(seed)
        flips = (np.abs(random.choice((-1.0, 1.0), size=len(change)) @ change) for _ in range(SWAPS))
        seen = abs(change.sum()) * (1 - 1e-12)  # equal sums may differ in their last digit
        p = (1 + sum(bool(value >= seen) for value in flips)) / (1 + SWAPS)
        method = "permutation test"
    return PairedTest(float(change.mean()), *interval, p, method)
