"""What was measured of one model: quality, size, speed, and every prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pykd.evaluation.latency import Speed
from pykd.evaluation.metrics import ClassQuality
from pykd.evaluation.routing import Routing

#: Task -> (metric, how it is written, decimals) of what a log says first; other tasks have accuracy and errors.
HEADLINES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "token-classification": (("f1", "F1", 4),),
    "seq2seq-lm": (("chrf", "chrF", 2), ("bleu", "BLEU", 2)),
    "causal-lm": (("perplexity", "perplexity", 3),),
    "masked-lm": (("perplexity", "perplexity", 3),),
}


@dataclass(frozen=True)
class Report:
    """Measurements of one model on one held-out split, on the machine they were made on.

    accuracy and the macro means ``precision``, ``recall``, ``f1`` are shares, 0..1. parameters counts weights that the
    model stands for, nonzero_parameters those that are not zero. size_bytes: of the file the weights are saved in.
    task: of the data. metrics: every metric of the task; score: their weighted mean, 0..1, by ``score_formula``.
    For other tasks than classification, precision, recall and f1 are those of ``metrics`` (0 where it has none),
    per_class and confusion are empty, labels and predictions are one per counted position, or for generated ``texts``
    their CRC-32. latency_*_ms: one call at batch 1 over ``latency_rounds`` calls; throughput_per_s: examples a second
    at ``throughput_batch``. labels, predictions, confidences (probability of the prediction): one an example, in order.
    speedup_over: how many times faster than another model, by name, from alternating rounds.
    intervals: 95 % confidence interval of each metric, by bootstrap over examples. example_scores: one a test example,
    higher is better, what ``example_score`` names; empty for classification, where an example is right or wrong.
    speeds: at several batch sizes and lengths. peak_memory_bytes: tensors and a forward pass at batch 1, None where it
    cannot be read; flops: operations of that pass. components: parameters of each part of the model. routing: what the
    router of a model did.
    """

    name: str
    accuracy: float
    precision: float
    recall: float
    f1: float
    per_class: tuple[ClassQuality, ...]
    confusion: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...]
    parameters: int
    nonzero_parameters: int
    size_bytes: int
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    latency_rounds: int
    throughput_per_s: float
    throughput_batch: int
    threads: int
    device: str
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    confidences: tuple[float, ...]
    speedup_over: dict[str, float] = field(default_factory=dict)
    task: str = "classification"
    metrics: dict[str, float] = field(default_factory=dict)
    score: float = 0.0
    score_formula: str = ""
    texts: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    example_scores: tuple[float, ...] = ()
    example_score: str = "right answers"
    speeds: tuple[Speed, ...] = ()
    peak_memory_bytes: int | None = None
    flops: int = 0
    components: dict[str, int] = field(default_factory=dict)
    routing: Routing | None = None

    @property
    def errors(self) -> int:
        """How many examples are classified wrongly."""
        return sum(label != found for label, found in zip(self.labels, self.predictions, strict=True))

    def scores(self) -> tuple[float, ...]:
        """A score of each test example, higher is better: ``example_scores``, or 1 for a right answer and 0 else."""
        if self.example_scores:
            return self.example_scores
        return tuple(float(label == found) for label, found in zip(self.labels, self.predictions, strict=True))

    def quality(self) -> float:
        """What models are ranked by, higher is better: the accuracy of classes, else the quality score."""
        return self.accuracy if self.task == "classification" else self.score

    def headline(self) -> str:
        """The task's foremost metrics in words: accuracy and errors, F1 of tags, chrF and BLEU, perplexity."""
        if self.task not in HEADLINES:
            return f"accuracy {100 * self.accuracy:.2f} % ({self.errors} errors)"
        return ", ".join(f"{shown} {self.metrics[name]:.{digits}f}" for name, shown, digits in HEADLINES[self.task])

    def agreement(self, other: Report) -> float:
        """Share of examples, 0..1, on which two models predict the same class; ValueError for unequal test sets."""
        if self.labels != other.labels:
            raise ValueError(
                f"{self.name} and {other.name} were measured on different examples ({len(self.labels)} and "
                f"{len(other.labels)}); evaluate both on the same test split"
            )
        same = sum(a == b for a, b in zip(self.predictions, other.predictions, strict=True))
        return same / len(self.labels)

    def with_speedup(self, over: str, ratio: float) -> Report:
        """The same report that also knows how many times faster the model is than the one named ``over``."""
        return replace(self, speedup_over={**self.speedup_over, over: ratio})

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values for JSON; ``Report.from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """A report as :meth:`to_dict` wrote it, also after a trip through JSON. Unknown keys are an error."""
        known = {entry.name for entry in fields(cls)}
        if set(values) - known:
            raise ValueError(f"not a report: unknown fields {', '.join(sorted(set(values) - known))}")
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()
        }
        read["speeds"] = tuple(Speed(**entry) for entry in values.get("speeds", ()))
        read["per_class"] = tuple(ClassQuality(**entry) for entry in values["per_class"])
        read["intervals"] = {name: tuple(ends) for name, ends in values.get("intervals", {}).items()}
        read["routing"] = Routing.from_dict(values["routing"]) if values.get("routing") else None
        read["confusion"] = tuple(tuple(row) for row in values["confusion"])
        return cls(**read)
