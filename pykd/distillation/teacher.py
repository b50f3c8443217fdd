"""The teacher's logits: computed with each batch, or once for all when the training set is fixed and they fit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
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
    """Logits of a frozen teacher for batches of a training set.

    When every row keeps its logits in memory (``cached``), each is computed once, in the order of the data set, so that
    they do not depend on the step at which a run was interrupted and resumed.
    """

    def __init__(self, model: nn.Module, data: DataBundle | Loader) -> None:
        self.model = model
        self.data: DataBundle | Loader = data
        self.cached: Tensor | None = None

    def remember(self, config: TrainConfig, *, cache_bytes: int, progress: bool | None) -> bool:
        """Compute every row's logits if that saves work and fits in ``cache_bytes``; True when it was done."""
        data = self.data
        if not isinstance(data, DataBundle) or config.total_steps(_steps(data, config)) <= _steps(data, config):
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

    def __call__(self, batch: Batch) -> Tensor:
        """Logits of a batch; the teacher gets no gradient and does not change."""
        rows = batch.pop(ROW, None)
        if self.cached is not None and rows is not None:
            return self.cached[rows]
        with torch.no_grad():
            return logits(self.model, batch)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The teacher in eval mode, and as it was afterwards."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _all_rows(self, data: DataBundle, config: TrainConfig, budget: int, progress: bool | None) -> Tensor | None:
        from tqdm import tqdm

        device = next(self.model.parameters()).device
        found: list[Tensor] = []
        order = batches(data.train, data.collate, config.batch_size)
        disable = None if progress is None else not progress
        for batch in tqdm(order, "teacher logits", _steps(data, config), unit="batch", disable=disable, leave=False):
            with torch.no_grad(), _autocast(config, device):
                out = logits(self.model, move(batch, device))
            if out.dim() != 2 or out[0].nbytes * len(data.train) > budget:
                return None
            found.append(out)
        return torch.cat(found)


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
