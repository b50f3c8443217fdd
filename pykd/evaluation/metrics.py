"""Classification quality from labels and predictions, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pykd.errors import DataError


@dataclass(frozen=True)
class ClassQuality:
    """Precision, recall and F1 (0..1) of one class, and how many examples have its label."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Quality:
    """accuracy; unweighted means over classes of precision, recall and F1 (0..1); confusion[label][prediction]."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    per_class: tuple[ClassQuality, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def quality(labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str]) -> Quality:
    """Score class predictions (scikit-learn's ``precision_recall_fscore_support`` and ``confusion_matrix``).

    Macro means run over the classes that occur among labels or predictions; a class that is never predicted has
    precision 0. Raises DataError when a label or a prediction is no class number, or scikit-learn is not installed.

    >>> quality([0, 0, 1, 1], [0, 1, 1, 1], ("a", "b")).accuracy
    0.75
    """
    for kind, values in (("label", labels), ("prediction", predictions)):
        wrong = next((value for value in values if not 0 <= value < len(class_names)), None)
        if wrong is not None:
            raise DataError(
                f"{kind} {wrong} is out of range: the data names {len(class_names)} classes "
                f"(0..{len(class_names) - 1}); model and data must have the same classes"
            )
    try:
        from sklearn import metrics
    except ImportError:
        raise DataError("evaluation needs scikit-learn: install it with `pip install 'pykd[reports]'`") from None
    numbers = list(range(len(class_names)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predictions, labels=numbers, zero_division=0.0
    )
    confusion = metrics.confusion_matrix(labels, predictions, labels=numbers)
    occurring = [n for n in numbers if confusion[n].sum() + confusion[:, n].sum() > 0]
    return Quality(
        accuracy=float(metrics.accuracy_score(labels, predictions)),
        precision=float(precision[occurring].mean()),
        recall=float(recall[occurring].mean()),
        f1=float(f1[occurring].mean()),
        per_class=tuple(
            ClassQuality(str(class_names[n]), float(precision[n]), float(recall[n]), float(f1[n]), int(support[n]))
            for n in numbers
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )
