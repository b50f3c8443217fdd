"""How a model's inputs and answers were distributed when all was well: a JSON file that later traffic is held against.

Quantities of a prediction: ``confidence`` (probability of the answer), ``entropy`` (of all classes, 0..1 of what is
possible), ``length`` (tokens; texts alone have one), ``latency_ms`` (of a request, so told of one of its predictions:
values that repeat would look surer than they are), and of its embedding, the vector that the classifier reads,
``embedding_distance`` from the baseline's mean and ``embedding_1`` ... along the baseline's principal directions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pykd.errors import ArtifactError
from pykd.io.files import atomic_write

FORMAT_VERSION = 1
#: Values of each quantity that a baseline keeps: evenly spaced order statistics.
KEPT = 1000
#: Principal directions of the embeddings that a baseline keeps.
DIRECTIONS = 3
Vectors = NDArray[np.float32]


def quantities(
    probabilities: ArrayLike, *, length: float | None = None, latency_ms: float | None = None
) -> dict[str, float]:
    """What one prediction is described by, from the probabilities (classes) of its answer.

    Raises ValueError for probabilities that are not finite.

    >>> quantities([0.5, 0.5], length=7)
    {'confidence': 0.5, 'entropy': 1.0, 'length': 7.0}
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    if not np.isfinite(shares).all():
        raise ValueError(f"expected probabilities, got {shares.tolist()}: look for NaN or infinite weights")
    positive = shares[shares > 0]
    most = np.log(len(shares)) if len(shares) > 1 else 1.0
    found = {"confidence": float(shares.max()), "entropy": float(-(positive * np.log(positive)).sum() / most)}
    for name, value in (("length", length), ("latency_ms", latency_ms)):
        if value is not None:
            found[name] = float(value)
    return found


@dataclass(frozen=True)
class Embeddings:
    """Mean and principal directions of the baseline's embeddings. directions: (directions, width), of length 1."""

    mean: Vectors
    directions: Vectors

    @classmethod
    def of(cls, vectors: ArrayLike) -> Embeddings:
        """Fit to vectors (rows, width)."""
        rows = np.asarray(vectors, dtype=np.float32)
        mean = rows.mean(0)
        _, _, right = np.linalg.svd(rows - mean, full_matrices=False)
        return cls(mean, right[:DIRECTIONS])

    def describe(self, vector: ArrayLike) -> dict[str, float]:
        """An embedding as the numbers that are watched."""
        offset = np.asarray(vector, dtype=np.float32) - self.mean
        along = {f"embedding_{n}": float(value) for n, value in enumerate(self.directions @ offset, start=1)}
        return {"embedding_distance": float(np.linalg.norm(offset)), **along}


@dataclass(frozen=True)
class Baseline:
    """What a model's traffic is held against. values: of each quantity, sorted. labels: predictions by class."""

    model: str
    rows: int
    values: Mapping[str, tuple[float, ...]]
    labels: Mapping[str, int]
    embeddings: Embeddings | None = None

    @classmethod
    def of(
        cls,
        model: str,
        rows: Sequence[Mapping[str, float]],
        labels: Sequence[str],
        *,
        vectors: Sequence[ArrayLike | None] | None = None,
    ) -> Baseline:
        """From the quantities and the answers of ``rows`` predictions, and the embeddings of those that have one.

        Raises ValueError without rows, or where the numbers of rows, labels and vectors differ.

        >>> rows = [quantities([0.9, 0.1]), quantities([0.2, 0.8])]
        >>> Baseline.of("digits", rows, ["odd", "even"]).values["confidence"]
        (0.8, 0.9)
        """
        given = [None] * len(rows) if vectors is None else list(vectors)
        counts = {len(rows), len(labels), len(given)}
        if len(counts) > 1 or not rows:
            raise ValueError(f"a baseline needs as many labels and embeddings as rows, and rows, got {sorted(counts)}")
        known = [vector for vector in given if vector is not None]
        found = Embeddings.of(np.stack(known)) if known else None
        described: list[dict[str, float]] = [
            dict(row) | (found.describe(vector) if found is not None and vector is not None else {})
            for row, vector in zip(rows, given, strict=True)
        ]
        names = dict.fromkeys(name for row in described for name in row)
        values = {name: _thinned([row[name] for row in described if name in row]) for name in names}
        return cls(model, len(rows), values, dict(Counter(labels)), found)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "rows": self.rows,
            "values": self.values,
            "labels": self.labels,
        }
        if self.embeddings is not None:
            content["embeddings"] = {
                "mean": self.embeddings.mean.tolist(),
                "directions": self.embeddings.directions.tolist(),
            }
        atomic_write(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Baseline:
        """Read what :meth:`save` wrote. Raises ArtifactError for a file that is none, or of another format."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {content['format_version']}, this pykd reads {FORMAT_VERSION}")
            found = content.get("embeddings")
            names = ("mean", "directions") if found else ()
            arrays = {name: np.asarray(found[name], dtype=np.float32) for name in names}
            return cls(
                model=str(content["model"]),
                rows=int(content["rows"]),
                values={name: tuple(map(float, values)) for name, values in content["values"].items()},
                labels={name: int(count) for name, count in content["labels"].items()},
                embeddings=Embeddings(**arrays) if arrays else None,
            )._sound()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is no baseline that can be read ({error}): make it again") from None

    def _sound(self) -> Baseline:
        """Itself, if later traffic can be held against it. Raises ValueError."""
        if not sum(self.labels.values()) or not all(
            values and np.isfinite(values).all() for values in self.values.values()
        ):
            raise ValueError("a quantity without values, or with some that are not finite")
        if self.embeddings is not None and self.embeddings.directions.shape[1:] != self.embeddings.mean.shape:
            raise ValueError("directions of another width than the mean's")
        return self


def _thinned(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    if len(ordered) <= KEPT:
        return tuple(ordered)
    return tuple(ordered[i * (len(ordered) - 1) // (KEPT - 1)] for i in range(KEPT))
