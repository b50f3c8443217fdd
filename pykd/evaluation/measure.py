"""The verb `evaluate`: everything a report says about one model, measured in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pykd.data.bundle import DataBundle, batches
from pykd.errors import DataError
from pykd.evaluation.answers import answers
from pykd.evaluation.counting import count_parameters, saved_bytes, state_bytes
from pykd.evaluation.footprint import components, count_flops, peak_memory
from pykd.evaluation.intervals import bootstrap, class_statistic
from pykd.evaluation.latency import device_of, evaluating, measure_latency, measure_speeds, measure_throughput
from pykd.evaluation.metrics import quality
from pykd.evaluation.report import Report
from pykd.evaluation.routing import measure_routing
from pykd.evaluation.score import WEIGHTS, quality_score
from pykd.models.adapter import logits, move

#: Test examples that the latency at batch 1 goes round: enough that texts of different lengths take part.
LATENCY_EXAMPLES = 32
#: Batches that the throughput goes round.
THROUGHPUT_BATCHES = 4


def evaluate(
    model: nn.Module,
    data: DataBundle,
    *,
    name: str = "model",
    batch_size: int = 64,
    latency_rounds: int = 100,
    batch_sizes: Sequence[int] = (),
    lengths: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
    weights: Mapping[str, float] | None = None,
    bertscore_model: str | os.PathLike[str] | None = None,
) -> Report:
    """Measure a model on the held-out split of ``data``: quality, size and speed. The model is not changed.

    The metrics are those of ``data.task``: accuracy and macro precision, recall, F1 of classes; seqeval's of tags;
    perplexity and token accuracy of language models; BLEU, chrF, TER and ROUGE of what an encoder-decoder generates.
    weights: of the metrics in the score, else those of ``pykd.evaluation.score.WEIGHTS``. bertscore_model: local folder
    of an encoder, to add BERTScore to the metrics of generated texts.

    batch_size: of the quality pass and of the throughput. latency_rounds: timed calls at batch 1, after a warm-up, on
    the first test examples in turn, on the model's device, with torch's current number of threads (the report has it).
    batch_sizes, lengths: rows and tokens of further calls to time, every size at every length (a fifth of
    ``latency_rounds`` calls each); lengths count only where the data has ``input_ids``.
    path: file or folder the model is saved in, whose bytes are reported; without it, its state is saved temporarily.

    Raises DataError when model and data have different classes or the scores are not finite, TypeError for data that is
    no DataBundle, ArtifactError for a path without weights.

    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.eye(3)[i % 3], "labels": i % 3} for i in range(9)]
    >>> data = DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="corners")
    >>> report = evaluate(nn.Identity(), data, latency_rounds=5)
    >>> report.accuracy, report.errors
    (1.0, 0)
    """
    if not isinstance(data, DataBundle):
        raise TypeError(
            f"data must be a DataBundle, got {type(data).__name__}; wrap the splits: DataBundle(train=..., test=..., "
            "collate=..., class_names=..., name=...)"
        )
    size_bytes = state_bytes(model) if path is None else saved_bytes(path)
    measured = _quality(model, data, batch_size, bertscore_model)
    score, formula = quality_score(measured["metrics"], weights or WEIGHTS[data.task])
    singles = [data.collate([data.test[index]]) for index in range(min(LATENCY_EXAMPLES, len(data.test)))]
    latency = measure_latency(model, singles, rounds=latency_rounds)
    rows = [
        dict(batch)
        for batch, _ in zip(batches(data.test, data.collate, batch_size), range(THROUGHPUT_BATCHES), strict=False)
    ]
    full = [batch for batch in rows if len(batch["labels"]) == batch_size] or rows
    parameters, nonzero = count_parameters(model)
    return Report(
        name=name,
        **measured,
        task=data.task,
        score=score,
        score_formula=formula,
        class_names=tuple(data.class_names),
        parameters=parameters,
        nonzero_parameters=nonzero,
        size_bytes=size_bytes,
        latency_p50_ms=latency.p50_ms,
        latency_p95_ms=latency.p95_ms,
        latency_p99_ms=latency.p99_ms,
        latency_rounds=latency.rounds,
        throughput_per_s=measure_throughput(model, full),
        throughput_batch=len(full[0]["labels"]),
        threads=torch.get_num_threads(),
        device=str(device_of(model)),
        speeds=measure_speeds(model, full[0], batch_sizes, lengths, rounds=max(3, latency_rounds // 5)),
        peak_memory_bytes=peak_memory(model, singles[0]),
        flops=count_flops(model, singles[0]),
        components=components(model),
        routing=measure_routing(
            model, data, batch_size=batch_size, rounds=max(3, latency_rounds // 5), examples=LATENCY_EXAMPLES
        ),
    )


def _quality(
    model: nn.Module, data: DataBundle, batch_size: int, bertscore_model: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """The fields of a report that say how good the answers are."""
    names = ("accuracy", "precision", "recall", "f1")
    if data.task == "classification":
        labels, predictions, confidences = predict(model, data, batch_size=batch_size)
        scored = quality(labels, predictions, data.class_names)
        found: dict[str, Any] = {name: getattr(scored, name) for name in names}
        found |= {"metrics": dict(found), "per_class": scored.per_class, "confusion": scored.confusion}
        found["intervals"] = bootstrap(class_statistic(labels, predictions, len(data.class_names)), len(labels))
        rows: tuple[Any, ...] = (labels, predictions, confidences)
    else:
        folder = str(bertscore_model) if bertscore_model is not None else None
        answered = answers(model, data, batch_size=batch_size, bertscore_model=folder, intervals=True)
        rows = (answered.labels, answered.predictions, answered.confidences)
        right = sum(a == b for a, b in zip(answered.labels, answered.predictions, strict=True))
        share = {"accuracy": right / max(1, len(answered.labels))}
        found = {name: (share | answered.metrics).get(name, 0.0) for name in names}
        found |= {"metrics": answered.metrics, "per_class": (), "confusion": (), "texts": tuple(answered.texts)}
        found |= {"intervals": answered.intervals, "example_scores": tuple(answered.scores)}
        found["example_score"] = answered.score
    return found | dict(zip(("labels", "predictions", "confidences"), map(tuple, rows), strict=True))


def predict(model: nn.Module, data: DataBundle, *, batch_size: int = 64) -> tuple[list[int], list[int], list[float]]:
    """(labels, predictions, probabilities of the predictions) over the test split, in its order.

    Raises DataError when the model's classes are not the data's, and when a score is NaN or infinite.
    """
    device = device_of(model)
    labels: list[int] = []
    predictions: list[int] = []
    confidences: list[float] = []
    with evaluating(model):
        for batch in batches(data.test, data.collate, batch_size):
            scores = logits(model, move(batch, device)).float()
            if scores.shape[-1] != len(data.class_names):
                raise DataError(
                    f"the model tells {scores.shape[-1]} classes apart, but {data.name!r} names "
                    f"{len(data.class_names)}; use a model with a head for these classes"
                )
            if not bool(scores.isfinite().all()):
                raise DataError(
                    f"the model's scores are not finite for test examples {len(labels)} to "
                    f"{len(labels) + len(scores) - 1}; look for NaN or infinite weights"
                )
            confidence, best = scores.softmax(-1).max(-1)
            labels += batch["labels"].tolist()
            predictions += best.tolist()
            confidences += [round(value, 6) for value in confidence.tolist()]
    return labels, predictions, confidences
