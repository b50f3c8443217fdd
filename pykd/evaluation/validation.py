"""What a run is validated by: the metrics of a model on held-out examples, and those that it gets most wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pykd.data.bundle import DataBundle
from pykd.evaluation.examples import SHOWN_CHARACTERS
from pykd.evaluation.measure import predict
from pykd.evaluation.metrics import quality

#: Examples of errors that a validation keeps.
WORST = 5


def classification_validator(data: DataBundle, *, batch_size: int = 64) -> Callable[[nn.Module], dict[str, Any]]:
    """validate(model) for a classifier: accuracy and macro precision, recall, F1 on the test split of ``data``.

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
                "text": str(data.test[index].get("text", ""))[:SHOWN_CHARACTERS],
            }
            for index in worst
        ]
        names = ("accuracy", "precision", "recall", "f1")
        return {name: getattr(scored, name) for name in names} | {"wrong": wrong, "examples": examples}

    return validate
