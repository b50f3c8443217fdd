"""What the service asks of a model: inputs made ready one by one, and answered together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pykd.models.adapter import logits
from pykd.monitoring import HeadInputs


@dataclass(frozen=True)
class Input:
    """One input, ready to be computed; `length` in tokens, 1 for images."""

    length: int
    content: Any


@dataclass(frozen=True)
class Answer:
    """What a model says about one input.

    says: fields of a prediction of the service. index, probabilities: from models that classify whole inputs.
    vector: the embedding that the classifier read, for monitoring.
    """

    says: dict[str, Any] = field(default_factory=dict)
    index: int | None = None
    probabilities: list[float] | None = None
    vector: NDArray[np.float32] | None = None


class Predictor(Protocol):
    """`prepare` runs in threads of its own and `compute` in another, each on several inputs at once.

    takes: "text" or "image". labels: names of the classes, none where it generates. Errors of `prepare` are ValueErrors
    that say what is wrong with which input.
    """

    task: str
    takes: str
    labels: tuple[str, ...]

    def prepare(self, inputs: Sequence[Any]) -> list[Input]: ...

    def compute(self, inputs: list[Input]) -> list[Answer]: ...


def classify(
    model: nn.Module, batch: dict[str, Tensor], head: HeadInputs, *, independent: bool = False
) -> list[Answer]:
    """The likeliest class of every row, and all probabilities; independent: each class by itself (several may hold).

    head: of the model, whose inputs become the answers' vectors.
    """
    scores = logits(model, batch).float()
    probabilities = scores.sigmoid() if independent else torch.softmax(scores, dim=-1)
    best = probabilities.argmax(dim=-1).tolist()
    vectors = head.take()
    seen = vectors if vectors is not None and len(vectors) == len(best) else [None] * len(best)
    rows = zip(best, probabilities.tolist(), seen, strict=True)
    return [Answer(index=index, probabilities=row, vector=vector) for index, row, vector in rows]
