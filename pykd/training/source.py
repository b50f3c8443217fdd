"""Batches of a run as a function of (seed, epoch, position): any step can be returned to after an interruption."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pykd.data.bundle import DataBundle, batches
from pykd.errors import DataError
from pykd.training.rng import seed_everything, set_rng

Batch = dict[str, Tensor]
RngState = tuple[dict[str, Tensor], dict[str, Any]]


@runtime_checkable
class Loader(Protocol):
    """What the loop needs of a loader, a ``torch.utils.data.DataLoader`` for instance: batches, again each epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Source:
    """The training batches of a bundle (shuffled by (seed, epoch)) or of a loader (its own order, seeded per epoch).

    A loader that shuffles with torch's global generator, like ``DataLoader(shuffle=True)``, is repeatable because that
    generator is seeded from (seed, epoch) before the epoch's iterator is made.
    """

    def __init__(self, data: DataBundle | Loader, *, batch_size: int, seed: int) -> None:
        if not isinstance(data, (DataBundle, Loader)):
            raise TypeError(
                f"data must be a DataBundle or a loader of batches with a length, got {type(data).__name__}; "
                "an iterator that can run only once cannot be trained on for several epochs or resumed"
            )
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.steps_per_epoch = math.ceil(len(data.train) / batch_size) if isinstance(data, DataBundle) else len(data)
        if self.steps_per_epoch == 0:
            raise DataError("the training set is empty: there is nothing to train on")

    def fingerprint(self) -> str:
        """Identity of the data as far as it is known: a checkpoint of other data is refused."""
        return self.data.fingerprint if isinstance(self.data, DataBundle) else f"loader of {len(self.data)} batches"

    def stream(self, start: int, total: int, rng: RngState | None) -> Iterator[Batch]:
        """Batches of steps ``start`` to ``total - 1``; ``rng`` is the random state an interrupted run had there."""
        step = start
        while step < total:
            epoch, position = divmod(step, self.steps_per_epoch)
            seed_everything(self.seed, epoch)
            batches_left = self._epoch(epoch, position)
            if position and rng is not None:
                set_rng(*rng)
            rng = None
            for batch in batches_left:
                yield batch
                step += 1
                if step == total:
                    return

    def _epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches ``start`` and following of an epoch."""
        if isinstance(self.data, DataBundle):
            train, collate = self.data.train, self.data.collate
            return batches(train, collate, self.batch_size, seed=self.seed, epoch=epoch, shuffle=True, start=start)
        set_epoch = getattr(getattr(self.data, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        iterator = iter(self.data)
        for _ in range(start):
            next(iterator)
        return iterator


def batch_to_float(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of a step as plain floats: tensors of one element are read once, here."""
    return {name: float(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in values.items()}
