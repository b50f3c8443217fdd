"""Batches of a run as a function of (seed, step): any step can be returned to after an interruption or a rollback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pykd.data.bundle import DataBundle
from pykd.errors import DataError
from pykd.training.order import epoch_order, row_lengths, share
from pykd.training.rng import seed_everything

Batch = dict[str, Tensor]
#: One forward pass of a step: the batch, and whether it counts. One that does not keeps processes in step at the end.
Part = tuple[Batch, bool]


@runtime_checkable
class Loader(Protocol):
    """What the loop needs of a loader, a ``torch.utils.data.DataLoader`` for instance: batches, again each epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Source:
    """The training batches of a bundle (shuffled by (seed, epoch)) or of a loader (its own order, seeded per epoch).

    A step is ``accumulate`` batches of ``batch_size`` rows in each of ``processes`` processes; this one has number
    ``rank``. A loader that shuffles with torch's global generator, like ``DataLoader(shuffle=True)``, is repeatable
    because that generator is seeded from (seed, step) before every batch. Its batches are dealt to the processes in
    turn, unless its sampler already deals them (a DistributedSampler).
    """

    def __init__(
        self,
        data: DataBundle | Loader,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
        group_by_length: bool = False,
    ) -> None:
        if not isinstance(data, (DataBundle, Loader)):
            raise TypeError(
                f"data must be a DataBundle or a loader of batches with a length, got {type(data).__name__}; "
                "an iterator that can run only once cannot be trained on for several epochs or resumed"
            )
        if group_by_length and not isinstance(data, DataBundle):
            raise ValueError("group_by_length needs a DataBundle: a loader has its own order")
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.accumulate, self.rank, self.processes = accumulate, rank, processes
        dealt = getattr(getattr(data, "sampler", None), "num_replicas", 1) > 1
        self.dealers = 1 if dealt else processes
        self.lengths = row_lengths(data.train) if group_by_length and isinstance(data, DataBundle) else None
        if isinstance(data, DataBundle):
            self.steps_per_epoch = math.ceil(len(data.train) / self._rows)
        else:
            self.steps_per_epoch = math.ceil(len(data) / (accumulate * self.dealers))
        if self.steps_per_epoch == 0:
            raise DataError("the training set is empty: there is nothing to train on")

    @property
    def _rows(self) -> int:
        return self.batch_size * self.accumulate * self.processes

    def fingerprint(self) -> str:
        """Identity of the data as far as it is known: a checkpoint of other data is refused."""
        return self.data.fingerprint if isinstance(self.data, DataBundle) else f"loader of {len(self.data)} batches"

    def stream(self, start: int, total: int) -> Iterator[list[Part]]:
        """This process's batches of steps ``start`` to ``total - 1``, with every generator seeded for each step."""
        step = start
        while step < total:
            epoch, position = divmod(step, self.steps_per_epoch)
            bundle = isinstance(self.data, DataBundle)
            for parts in self._of_bundle(epoch, position) if bundle else self._of_loader(epoch, position):
                yield parts
                step += 1
                if step == total:
                    return

    def _of_bundle(self, epoch: int, start: int) -> Iterator[list[Part]]:
        assert isinstance(self.data, DataBundle)
        train, collate, size = self.data.train, self.data.collate, self._rows
        order = epoch_order(len(train), seed=self.seed, epoch=epoch, step_rows=size, lengths=self.lengths)
        for position in range(start, self.steps_per_epoch):
            seed_everything(self.seed, epoch * self.steps_per_epoch + position, self.rank)
            rows = order[position * size : (position + 1) * size]
            mine = [
                share(rows, self.accumulate * self.processes, index * self.processes + self.rank)
                for index in range(self.accumulate)
            ]
            yield [(collate([train[row] for row in part or rows[:1]]), bool(part)) for part in mine]

    def _of_loader(self, epoch: int, start: int) -> Iterator[list[Part]]:
        """The loader's batches, its first ``start`` steps read and passed over."""
        assert not isinstance(self.data, DataBundle)
        set_epoch = getattr(getattr(self.data, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        first = epoch * self.steps_per_epoch
        seed_everything(self.seed, first)
        batches = iter(self.data)
        for position in range(self.steps_per_epoch):
            seed_everything(self.seed, first + position)
            read = [batch for _, batch in zip(range(self.accumulate * self.dealers), batches, strict=False)]
            if not read:
                raise DataError(
                    f"the loader's length is {len(self.data)} batches, but epoch {epoch + 1} ended before: give a "
                    "loader that begins again each epoch and has as many batches as it says"
                )
            if position < start:
                continue
            if self.processes > 1:
                seed_everything(self.seed, first + position, self.rank)
            rank = self.rank if self.dealers > 1 else 0
            places = [index * self.dealers + rank for index in range(self.accumulate)]
            yield [(read[place] if place < len(read) else read[0], place < len(read)) for place in places]


def batch_to_float(values: dict[str, Any]) -> dict[str, float]:
    """Metrics of a step as plain floats: tensors of one element are read once, here."""
    return {name: float(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in values.items()}
