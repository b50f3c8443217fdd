"""What a batch's labels must be, and how a model's positions line up with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pykd.errors import DataError
from pykd.models.adapter import unwrap

#: Labels with this number count nowhere.
IGNORED = -100
#: Classes of Hugging Face models whose position i predicts token i + 1 end in one of these.
CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


def predicts_next(model: nn.Module) -> bool:
    """True for causal language models: the logits of a position belong to the label of the next one."""
    return type(unwrap(model)).__name__.endswith(CAUSAL)


def check_batch(batch: Any, *, classes: int) -> None:
    """Raise DataError for a batch without labels, or with labels outside 0..classes-1 (-100 is ignored)."""
    if not isinstance(batch, dict) or not isinstance(batch.get("labels"), Tensor):
        found = f"a dict with {sorted(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"a batch must be a dict of tensors with 'labels', got {found}")
    labels = batch["labels"]
    if labels.is_floating_point():
        raise DataError(f"labels must be whole numbers, got {labels.dtype}")
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if wrong.numel():
        raise DataError(
            f"label {int(wrong[0])} is out of range: the model has {classes} classes (0..{classes - 1}); "
            "check the label column or build the model with more classes"
        )


def check_shapes(scores: Tensor, labels: Tensor) -> None:
    """Raise DataError unless every row (or every position) that the model scores has one label."""
    if scores.shape[:-1] != labels.shape:
        whole = "row" if scores.dim() == 2 else "position"
        raise DataError(
            f"labels {tuple(labels.shape)} do not go with logits {tuple(scores.shape)}: the model scores every "
            f"{whole}; give every {whole} a label (-100 where none counts), or use a model for the other task"
        )


def counted(model: nn.Module, batch: dict[str, Any]) -> int:
    """Labels of a batch that count towards its mean loss: what batches are weighed by when several make a step.

    Where there are no whole-number labels, the rows.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() > 0 and not labels.is_floating_point():
        return int(((labels[:, 1:] if predicts_next(model) else labels) != IGNORED).sum())
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), 1)
