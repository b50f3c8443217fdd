"""Loss and accuracy on the held-out split, the same two numbers for every task."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from pykd.data.bundle import DataBundle, batches
from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import logits, move
from pykd.training.labels import IGNORED, predicts_next


def held_out(model: nn.Module, data: DataBundle, *, batch_size: int = 64) -> dict[str, float]:
    """Mean cross entropy (nats) and share of right answers (0..1) over every label of the test split that counts.

    A label is one row's class, or one position's class or token; -100 does not count. Causal models are asked for the
    next token. Both are 0 where no label counts.

    >>> import torch
    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.eye(3)[i % 3], "labels": i % 3} for i in range(9)]
    >>> data = DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="corners")
    >>> held_out(nn.Identity(), data)["accuracy"]
    1.0
    """
    total, right, count = 0.0, 0, 0
    with evaluating(model):
        for batch in batches(data.test, data.collate, batch_size):
            batch = move(batch, device_of(model))
            scores, labels = logits(model, batch).float(), batch["labels"]
            if predicts_next(model):
                scores, labels = scores[:, :-1], labels[:, 1:]
            scores, labels = scores.flatten(0, -2), labels.flatten()
            total += float(F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum"))
            counted = labels != IGNORED
            right += int((scores.argmax(1) == labels)[counted].sum())
            count += int(counted.sum())
    return {"loss": total / max(1, count), "accuracy": right / max(1, count)}
