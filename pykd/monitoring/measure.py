"""A baseline from labelled data that is at hand, and the embeddings that a model's classifier reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, batches
from pykd.errors import DataError
from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import logits, move, num_classes, unwrap
from pykd.monitoring.baseline import Baseline, quantities


class HeadInputs:
    """The embeddings of a thread's newest batch: what the last layer with an output per class read, (rows, ``width``).

    What a layer reads at several positions is averaged: of images (rows, channels, height, width) over the last two,
    else over all but the first and the last. Of a model with a router (:mod:`pykd.models.router`), whose heads read the
    rows of their branches, it is what the router reads. Raises ValueError for a model without such a layer.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> inputs = HeadInputs(model)
    >>> _ = model(torch.zeros(5, 4))
    >>> inputs.take().shape
    (5, 8)
    """

    def __init__(self, model: nn.Module) -> None:
        head: Any = _head(model)
        self._newest: dict[int, Tensor] = {}  # by thread
        self.width = int(head.in_features if hasattr(head, "in_features") else head.in_channels)
        self._handle = head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._newest[threading.get_ident()] = inputs[0].detach()

    def take(self) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """The embeddings since the last time, float32 on the CPU; None when the head has not run."""
        found = self._newest.pop(threading.get_ident(), None)
        if found is None:
            return None
        if found.dim() == 4:
            found = found.flatten(2).mean(2)
        elif found.dim() > 2:
            found = found.flatten(1, -2).mean(1)
        taken: np.ndarray[Any, np.dtype[np.float32]] = found.float().cpu().numpy()
        return taken

    def close(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()


def measure_baseline(model: nn.Module, data: DataBundle, *, name: str = "model", batch_size: int = 64) -> Baseline:
    """The baseline of a classifier on the held-out split of ``data``; without latency, which belongs to a service.

    Raises DataError for a task without classes.

    >>> import torch
    >>> from pykd.data.bundle import stack
    >>> items = [{"pixel_values": torch.eye(3)[i % 3], "labels": i % 3} for i in range(9)]
    >>> data = DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="corners")
    >>> measure_baseline(nn.Linear(3, 3), data).rows
    9
    """
    if data.task != "classification":
        raise DataError(f"a baseline is of classes with probabilities, and {data.name!r} is for {data.task}")
    device = device_of(model)
    rows: list[dict[str, float]] = []
    labels: list[str] = []
    vectors: list[Any] = []
    with evaluating(model), _inputs(model) as head:
        for batch in batches(data.test, data.collate, batch_size):
            shares = logits(model, move(batch, device)).float().softmax(-1).cpu().numpy()
            lengths = token_counts(batch) or [None] * len(shares)
            rows += [quantities(row, length=length) for row, length in zip(shares, lengths, strict=True)]
            labels += [str(data.class_names[best]) for best in shares.argmax(-1)]
            vectors.append(head.take())
    return Baseline.of(name, rows, labels, vectors=list(np.concatenate(vectors)))


def token_counts(batch: dict[str, Tensor]) -> list[int | None]:
    """Tokens of each row that are no padding; empty for images, which have no length once they are made ready.

    >>> import torch
    >>> token_counts({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    [2, 3]
    """
    if "attention_mask" in batch:
        return [int(count) for count in batch["attention_mask"].sum(-1)]
    return [row.numel() for row in batch.get("input_ids", ())]


@contextmanager
def _inputs(model: nn.Module) -> Iterator[HeadInputs]:
    head = HeadInputs(model)
    try:
        yield head
    finally:
        head.close()


def _head(model: nn.Module) -> nn.Module:
    """The layer that reads the embedding of every row."""
    router = getattr(unwrap(model), "router", None)
    if isinstance(router, nn.Sequential):
        return router[0]
    classes = num_classes(model)
    heads = [
        module for module in model.modules() if classes in (_width(module, "features"), _width(module, "channels"))
    ]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no layer with one output for each of its {classes} classes")
    return heads[-1]


def _width(module: nn.Module, what: str) -> int | None:
    found = getattr(module, f"out_{what}", None)
    return found if isinstance(found, int) else None
