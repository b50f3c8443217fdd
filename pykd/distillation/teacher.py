"""The teachers of a run: kept still, and one teacher's logits computed once for all when they are fixed and fit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, Item, MapDataset, batches
from pykd.models.adapter import logits, move
from pykd.training.config import AUTOCAST, TrainConfig
from pykd.training.rng import preserved_rng
from pykd.training.source import Batch, Loader

#: Name under which a batch carries the indices of its rows in the training set.
ROW = "pykd_row"
#: Rows that are drawn twice to see whether the training set is fixed.
PROBES = 16


class Rows:
    """A training set whose items bring their index along."""

    def __init__(self, base: MapDataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int, /) -> Item:
        return {ROW: index, "item": self.base[index]}


class Teacher:
    """Frozen teachers, and the training data for them.

    When every row keeps its logits in memory (``cached``, of a single teacher), each is computed once, in the order of
    the data set, so that they do not depend on the step at which a run was interrupted and resumed.
    """

    def __init__(self, models: Sequence[nn.Module], data: DataBundle | Loader) -> None:
        self.models = list(models)
        self.data: DataBundle | Loader = data
        self.cached: Tensor | None = None

    def remember(self, config: TrainConfig, *, cache_bytes: int, progress: bool | None) -> bool:
        """Compute every row's logits if that saves work and fits in ``cache_bytes``; True when it was done."""
        data = self.data
        if len(self.models) > 1 or not isinstance(data, DataBundle):
            return False
        if config.total_steps(_steps(data, config)) <= _steps(data, config):
            return False
        with self.frozen():
            if not fixed(data.train):
                return False
            rows = self._all_rows(data, config, cache_bytes, progress)
        if rows is None:
            return False
        self.cached = rows
        self.data = dataclasses.replace(data, train=Rows(data.train), collate=with_rows(data))
        return True

    def known(self, batch: Batch) -> Tensor | None:
        """Logits of a batch if they were computed before; the numbers of its rows are taken out of it."""
        rows = batch.pop(ROW, None)
        if self.cached is None or rows is None:
            return None
        return self.cached[rows.to(self.cached.device)].to(rows.device)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The teachers in eval mode, and as they were afterwards."""
        was_training = [model.training for model in self.models]
        try:
            for model in self.models:
                model.eval()
            yield
        finally:
            for model, training in zip(self.models, was_training, strict=True):
                model.train(training)

    def _all_rows(self, data: DataBundle, config: TrainConfig, budget: int, progress: bool | None) -> Tensor | None:
        from tqdm import tqdm

        device = device_of(self.models[0])
        found: list[Tensor] = []
        order = batches(data.train, data.collate, config.batch_size)
        disable = None if progress is None else not progress
        for batch in tqdm(order, "teacher logits", _steps(data, config), unit="batch", disable=disable, leave=False):
            with torch.no_grad(), _autocast(config, device):
                out = logits(self.models[0], move(batch, device))
            if out.dim() != 2 or out[0].nbytes * len(data.train) > budget:
                return None
            found.append(out)
        return torch.cat(found)


def first_batch(data: DataBundle | Loader, model: nn.Module) -> Batch:
    """A small batch to try the models with, on the model's device; no random state is used up."""
    with preserved_rng():
        if isinstance(data, DataBundle):
            batch = data.collate([data.train[row] for row in range(min(2, len(data.train)))])
        else:
            batch = next(iter(data))
    return move(batch, device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters or, where all of them are packed, its buffers are."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _steps(data: DataBundle, config: TrainConfig) -> int:
    return -(-len(data.train) // config.batch_size)


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=AUTOCAST[config.autocast]) if config.autocast else contextlib.nullcontext()


def with_rows(data: DataBundle) -> Any:
    """The collate function of a training set of `Rows`."""

    def collate(items: list[Item]) -> Batch:
        return {**data.collate([item["item"] for item in items]), ROW: torch.tensor([item[ROW] for item in items])}

    return collate


def fixed(dataset: MapDataset) -> bool:
    """Whether rows drawn twice are equal; augmentation makes them differ. The random state stays as it was."""
    count = min(PROBES, len(dataset))
    with preserved_rng():
        return all(_equal(dataset[i * len(dataset) // count], dataset[i * len(dataset) // count]) for i in range(count))


def _equal(first: Item, second: Item) -> bool:
    return all(
        torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        for name, value in first.items()
    )
