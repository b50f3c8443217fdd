"""Test examples that a model gets wrong, ready to be looked at: as a picture or as text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pykd.data.bundle import DataBundle, Item
from pykd.evaluation.report import Report

#: Characters of a text that are shown.
SHOWN_CHARACTERS = 320


@dataclass(frozen=True)
class WrongExample:
    """One mistake: index in the test split, names of label and of both predictions (model, baseline), what was seen.

    confidence: the model's probability of its wrong answer, 0..1. png: the picture, text: the words; one is empty.
    """

    index: int
    label: str
    prediction: str
    baseline: str
    confidence: float
    png: bytes
    text: str


def wrong_examples(report: Report, baseline: Report, data: DataBundle, *, limit: int = 24) -> list[WrongExample]:
    """The mistakes that the model is surest of, at most ``limit`` of them. Raises ValueError for another test split."""
    if len(data.test) != len(report.labels):
        raise ValueError(
            f"{report.name} was measured on {len(report.labels)} examples, but the test split of {data.name!r} has "
            f"{len(data.test)}; give the data it was measured on"
        )
    wrong = [index for index, label in enumerate(report.labels) if report.predictions[index] != label]
    wrong.sort(key=lambda index: -report.confidences[index])
    names = report.class_names
    return [
        WrongExample(
            index=index,
            label=names[report.labels[index]],
            prediction=names[report.predictions[index]],
            baseline=names[baseline.predictions[index]] if baseline.labels == report.labels else "",
            confidence=report.confidences[index],
            png=_picture(data.test[index]),
            text=shortened(str(data.test[index].get("text", ""))),
        )
        for index in wrong[:limit]
    ]


def flips(report: Report, baseline: Report) -> tuple[int, int]:
    """(examples the baseline had right and the model has wrong, the reverse), over the same test split."""
    pairs = list(zip(report.labels, report.predictions, baseline.predictions, strict=True))
    lost = sum(now != label == before for label, now, before in pairs)
    won = sum(now == label != before for label, now, before in pairs)
    return lost, won


def worst_confusions(report: Report, limit: int = 8) -> Sequence[tuple[str, str, int]]:
    """The pairs (label, prediction, how often) that are confused most, most frequent first."""
    names = report.class_names
    pairs = [
        (names[label], names[found], count)
        for label, row in enumerate(report.confusion)
        for found, count in enumerate(row)
        if label != found and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]


def _picture(item: Item) -> bytes:
    """PNG of an item's pixels, stretched to the full range; empty when it has none."""
    pixels = item.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 3:
        return b""
    from matplotlib.image import imsave

    low, high = pixels.min(), pixels.max()
    image = ((pixels - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    buffer = io.BytesIO()
    imsave(buffer, image.permute(1, 2, 0).cpu().numpy(), format="png")
    return buffer.getvalue()


def shortened(text: str) -> str:
    """As much of a text as is shown.

    >>> shortened("word")
    'word'
    """
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " ..."
