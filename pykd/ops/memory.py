"""Large outputs on the CPU, in memory that is used again.

torch's CPU allocator maps every large tensor anew, so the first write to each of its pages is a page fault; for a
kernel that only streams through memory these faults cost several times the work itself, and on a virtual machine more
than that. A training step asks for the same gradient each time and frees it before the next: the pool keeps the blocks
that were freed last, in huge pages where Linux grants them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import operator
import os
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

#: Below this malloc recycles the memory by itself.
LEAST_BYTES = 4 << 20

#: What freed blocks may keep; the environment variable PYKD_POOL_BYTES sets another number, 0 keeps none.
POOL_BYTES = int(os.environ.get("PYKD_POOL_BYTES", 1 << 30))

_HUGE_PAGE = 2 << 20


class Pool:
    """Blocks of anonymous memory, handed out as storages and taken back when the last tensor over one is freed.

    Takes no lock, because memory may be freed in the middle of anything: a block is always in one place only, and the
    worst that two threads can do to each other is a block more.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free: deque[mmap.mmap] = deque()

    def storage(self, size: int) -> torch.UntypedStorage:
        """At least ``size`` bytes with undefined contents: the smallest free block that wastes less than a quarter."""
        blocks = []
        with contextlib.suppress(IndexError):
            while True:
                blocks.append(self.free.popleft())
        fitting = [block for block in blocks if size <= len(block) <= size + max(size // 4, _HUGE_PAGE)]
        best = min(fitting, key=len, default=None)
        self.free.extend(block for block in blocks if block is not best)
        if best is None:
            best = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            best.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(best, dtype=np.uint8)
        weakref.finalize(array, self._take_back, best).atexit = False
        return torch.from_numpy(array).untyped_storage()

    def _take_back(self, block: mmap.mmap) -> None:
        """Keep a block; those that have been free for longest go when all together exceed the limit."""
        self.free.append(block)
        while self.free and sum(map(len, list(self.free))) > self.limit:
            self.free.popleft()


_POOL = Pool(POOL_BYTES)


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty(shape)`, from the pool for large CPU tensors on Linux.

    Contiguous; contents undefined. Any other device, a small tensor or another system: plain `torch.empty`.

    >>> empty((2, 3), dtype=torch.float32, device=torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    strides = tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
    return torch.empty(0, dtype=dtype).set_(_POOL.storage(size), 0, tuple(shape), strides)
