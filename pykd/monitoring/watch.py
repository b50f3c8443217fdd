"""One model in use: its newest predictions beside its baseline, its newest true labels, what is alarming in them."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pykd.evaluation.metrics import quality
from pykd.monitoring.baseline import Baseline
from pykd.monitoring.drift import Drift, Thresholds, label_drift, number_drift

#: Predictions whose true labels may still come.
REMEMBERED = 10_000
#: Quantiles of the latency that are told.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Prediction:
    """One answer of a model. numbers: its quantities (see :mod:`pykd.monitoring.baseline`). vector: its embedding."""

    id: str
    label: str
    numbers: Mapping[str, float]
    vector: NDArray[np.float32] | None = field(default=None, compare=False)


class ModelWatch:
    """A rolling window over a model's predictions, and one over the labels that came for them.

    Without a baseline the first ``thresholds.window`` predictions become it, as soon as ``thresholds.minimum`` of them
    have an embedding, or none has. :meth:`check` says what drifts; ``alarms`` holds the sentences of what was alarming
    at the last check or label.

    >>> watch = ModelWatch("m", thresholds=Thresholds(window=4, minimum=2, minimum_labels=1))
    >>> for number in range(4):
    ...     _ = watch.predicted(Prediction(f"{number}", "a", {"confidence": 0.9}))
    >>> watch.baseline.rows, watch.labelled("3", "b"), watch.quality()["accuracy"]
    (4, 'a', 0.0)
    """

    def __init__(self, name: str, baseline: Baseline | None = None, thresholds: Thresholds | None = None) -> None:
        self.name, self.baseline = name, baseline
        self.thresholds = thresholds or Thresholds()
        self.predictions = 0
        self.drifts: list[Drift] = []
        self._window: deque[Prediction] = deque(maxlen=self.thresholds.window)
        self._pairs: deque[tuple[str, str]] = deque(maxlen=self.thresholds.window)
        self._answers: OrderedDict[str, str] = OrderedDict()

    def predicted(self, prediction: Prediction) -> Prediction:
        """Take one more prediction; returned as it is kept, the embedding described by its numbers.

        With the prediction that fills the first window the baseline is made.
        """
        self.remembered(self._described(prediction))
        if self.baseline is None and self._complete():
            self._begin()
        return self._window[-1]

    def remembered(self, prediction: Prediction) -> None:
        """Take a prediction of an earlier time, of which no embedding is left: no baseline is made of these alone."""
        self.predictions += 1
        self._window.append(prediction)
        self._answers[prediction.id] = prediction.label
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)

    def labelled(self, prediction: str, label: str) -> str:
        """Take the true label of a prediction, once; returns what had been predicted. KeyError for an unknown id."""
        answer = self._answers.pop(prediction)
        self._pairs.append((label, answer))
        return answer

    def knows(self, prediction: str) -> bool:
        """Whether a true label of this prediction can be taken."""
        return prediction in self._answers

    def check(self) -> list[Drift]:
        """Every quantity of the window against the baseline; empty before there is one, or too few rows."""
        self.drifts = []
        if self.baseline is not None and len(self._window) >= self.thresholds.minimum:
            for name, expected in self.baseline.values.items():
                actual = [p.numbers[name] for p in self._window if name in p.numbers]
                if len(actual) >= self.thresholds.minimum:
                    self.drifts.append(number_drift(name, expected, actual, self.thresholds))
            labels = Counter(prediction.label for prediction in self._window)
            self.drifts.append(label_drift(self.baseline.labels, labels, self.thresholds))
        return self.drifts

    def quality(self) -> dict[str, Any]:
        """Accuracy and macro F1 (0..1) over the newest true labels, and their number; None before there is one."""
        if not self._pairs:
            return {"labels": 0, "accuracy": None, "f1": None}
        names = [*sorted({name for pair in self._pairs for name in pair}), ""]  # a single one would be no matrix
        numbers = {name: number for number, name in enumerate(names)}
        true, found = zip(*((numbers[a], numbers[b]) for a, b in self._pairs), strict=True)
        scored = quality(true, found, names)
        return {"labels": len(true), "accuracy": scored.accuracy, "f1": scored.f1}

    @property
    def alarms(self) -> list[str]:
        """One sentence for everything that is beyond its threshold: drift at the last check, quality now."""
        return [drift.sentence() for drift in self.drifts if drift.alarm] + self.quality_alarms(self.quality())

    def quality_alarms(self, scored: Mapping[str, Any]) -> list[str]:
        """One sentence for each share of what :meth:`quality` has said that is below its threshold."""
        limits = {name: getattr(self.thresholds, name) for name in ("accuracy", "f1")}
        return [
            f"{name} has fallen to {scored[name]:.4f}, below {limit:g}, over {scored['labels']} labels"
            for name, limit in limits.items()
            if limit is not None and scored["labels"] >= self.thresholds.minimum_labels and scored[name] < limit
        ]

    def state(self) -> dict[str, Any]:
        """Everything above as JSON values, with the latencies of the window in milliseconds."""
        times = [p.numbers["latency_ms"] for p in self._window if "latency_ms" in p.numbers]
        return {
            "predictions": self.predictions,
            "window": len(self._window),
            "baseline_rows": self.baseline.rows if self.baseline is not None else None,
            "latency_ms": latencies(times),
            "drift": [drift.to_dict() for drift in self.drifts],
            "quality": self.quality(),
            "alarms": self.alarms,
        }

    def _complete(self) -> bool:
        """Whether the window is full and tells how the embeddings of the model lie, if it has any."""
        if len(self._window) < self.thresholds.window:
            return False
        known = sum(prediction.vector is not None for prediction in self._window)
        return not known or known >= self.thresholds.minimum

    def _begin(self) -> None:
        rows = list(self._window)
        numbers = [prediction.numbers for prediction in rows]
        self.baseline = Baseline.of(self.name, numbers, [p.label for p in rows], vectors=[p.vector for p in rows])
        self._window.extend([self._described(prediction) for prediction in rows])

    def _described(self, prediction: Prediction) -> Prediction:
        embeddings = self.baseline.embeddings if self.baseline is not None else None
        if prediction.vector is None or self.baseline is None:
            return prediction
        extra = embeddings.describe(prediction.vector) if embeddings is not None else {}
        return Prediction(prediction.id, prediction.label, {**prediction.numbers, **extra})


def latencies(times: ArrayLike) -> dict[str, float]:
    """P50, P95 and P99 in milliseconds; empty without times.

    >>> latencies([1.0, 2.0, 3.0])["p50"]
    2.0
    """
    if not np.size(times):
        return {}
    found = np.percentile(np.asarray(times), PERCENTILES)
    return {f"p{share}": round(float(value), 3) for share, value in zip(PERCENTILES, found, strict=True)}
