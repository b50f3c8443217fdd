"""Caches a small teacher in a process of its own and dies on the way: `cached.py DIR EXAMPLES_BEFORE_DEATH`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, stack
from pykd.distillation.cache import cache_teacher

#: 10 shards of 8 examples.
OPTIONS: dict[str, Any] = {"k": 4, "batch_size": 4, "shard_bytes": 8 * 4 * 4, "progress": False}


def bundle(size: int = 80) -> DataBundle:
    xs = torch.randn(size, 6, generator=torch.Generator().manual_seed(0))
    items = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(xs)]
    return DataBundle(items, items[:4], stack, ["a", "b", "c"], "noise", fingerprint=f"noise-{size}")


class Mortal(nn.Module):
    """A teacher that counts the examples it has seen and kills its process, as a power cut would, before the next."""

    def __init__(self, die_at: int = -1, classes: int = 12) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes))
        self.die_at, self.seen = die_at, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        if self.seen == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += len(x)
        scores: Tensor = self.body(x)
        return scores


if __name__ == "__main__":
    torch.set_num_threads(1)
    cache_teacher(Mortal(int(sys.argv[2])), bundle(), Path(sys.argv[1]), **OPTIONS)
