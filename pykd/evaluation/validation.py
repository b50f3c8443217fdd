"""What a run is validated by: the metrics of a model on held-out examples, and those that it gets most wrong."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

from torch import nn

from pykd.data.bundle import DataBundle
from pykd.evaluation.answers import Answers, answers
from pykd.evaluation.examples import SHOWN_CHARACTERS
from pykd.evaluation.measure import predict
from pykd.evaluation.metrics import quality
from pykd.evaluation.score import WEIGHTS, quality_score

#: Task -> the metric that decides which model is the best.
FIRST = {"token-classification": "f1", "causal-lm": "perplexity", "masked-lm": "perplexity", "seq2seq-lm": "score"}
#: Examples of errors that a validation keeps.
WORST = 5


def validator(data: DataBundle, *, batch_size: int = 64) -> Callable[[nn.Module], dict[str, Any]]:
    """validate(model) with the metrics of the task of ``data`` on its test split, the one that counts first.

    F1 of entities, perplexity of language models, the score of generated texts, accuracy of classes. Beside the
    metrics are ``wrong``, the numbers of the examples with an error, and ``examples``, the worst of them.
    """
    if data.task == "classification":
        return classification_validator(data, batch_size=batch_size)

    def validate(model: nn.Module) -> dict[str, Any]:
        found = answers(model, data, batch_size=batch_size)
        score, _ = quality_score(found.metrics, WEIGHTS[data.task])
        first = FIRST[data.task]
        metrics = {first: (found.metrics | {"score": score})[first], **found.metrics, "score": score}
        return metrics | _errors(found, data)

    return validate


def _errors(found: Answers, data: DataBundle) -> dict[str, Any]:
    """``wrong``, the numbers of the examples with an error, and ``examples``, the worst of them.

    Those with the most wrong positions, or, of texts, those that are least alike.
    """
    said: list[dict[str, Any]]
    if found.texts:
        alike = [SequenceMatcher(None, *pair).ratio() for pair in zip(found.references, found.texts, strict=True)]
        wrong = [index for index, share in enumerate(alike) if share < 1]
        worst = sorted(wrong, key=alike.__getitem__)[:WORST]
        said = [{"label": found.references[index], "prediction": found.texts[index]} for index in worst]
    else:
        counts = [count - right for count, right in zip(found.rows, found.right(), strict=True)]
        wrong = [index for index, count in enumerate(counts) if count]
        worst = sorted(wrong, key=lambda index: -counts[index])[:WORST]
        said = [{"wrong": counts[index], "of": found.rows[index]} for index in worst]
    examples = [{"index": i, "text": _text(data, i), **each} for i, each in zip(worst, said, strict=True)]
    return {"wrong": wrong, "examples": examples}


def _text(data: DataBundle, index: int) -> str:
    return str(data.test[index].get("text", ""))[:SHOWN_CHARACTERS]


def classification_validator(data: DataBundle, *, batch_size: int = 64) -> Callable[[nn.Module], dict[str, Any]]:
    """validate(model) for a classifier: accuracy, macro precision, recall, F1 and score on the test split of ``data``.

    The result also has ``wrong``, the numbers of the examples it got wrong, and ``examples``, those it was surest of.

    >>> import torch
    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.eye(3)[i % 3], "labels": i % 3} for i in range(9)]
    >>> data = DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="corners")
    >>> classification_validator(data)(nn.Identity())["f1"]
    1.0
    """

    def validate(model: nn.Module) -> dict[str, Any]:
        labels, found, confidences = predict(model, data, batch_size=batch_size)
        scored = quality(labels, found, data.class_names)
        wrong = [index for index, label in enumerate(labels) if found[index] != label]
        worst = sorted(wrong, key=lambda index: -confidences[index])[:WORST]
        examples = [
            {
                "index": index,
                "label": str(data.class_names[labels[index]]),
                "prediction": str(data.class_names[found[index]]),
                "confidence": confidences[index],
                "text": _text(data, index),
            }
            for index in worst
        ]
        metrics = {name: getattr(scored, name) for name in ("accuracy", "precision", "recall", "f1")}
        score, _ = quality_score(metrics, WEIGHTS[data.task])
        return metrics | {"score": score, "wrong": wrong, "examples": examples}

    return validate
