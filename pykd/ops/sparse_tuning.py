"""Measuring the routes of `sparse_linear` on the machine at hand."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .bitmask import PackedSparse
from .dispatch import native
from .sparse_linear import layout_of, run_route
from .sparse_route import Times, candidates, case_of, remember, remembered

#: Rounds in which every route runs once; the median counts. More where a round's calls take less than SHORT_S seconds
#: together: what else the machine does then moves medians of seven by more than the routes differ.
ROUNDS, MORE_ROUNDS, SHORT_S = 7, 25, 3e-3
#: Bytes written between two calls, so that each finds the weight outside the caches, as inside a model.
EVICT_BYTES = 48 << 20


def measure(packed: PackedSparse, *, rows: Sequence[int] = (1, 16, 128), again: bool = False) -> Times:
    """Microseconds of each route at each number of rows, {rows: {route: us}}; `sparse_linear` goes by them from now on.

    rows: how many rows of x calls will have, each at least 1. The result holds for every weight of this shape, element
    type and density (within 2 %), with this number of threads, and is kept in `$PYKD_CACHE` (else the user's cache
    folder) for later processes; `again` measures anew. Routes take turns; between two calls the caches are overwritten.
    Empty without the native module, on other devices than the CPU, and for an empty weight.

    >>> from pykd.nn.codecs.bitmask import pack
    >>> times = measure(pack(torch.eye(256)), rows=(1,))
    >>> native is None or sorted(times[1]) == ["dense", "expand", "panels"]
    True
    """
    rows = [int(number) for number in rows]
    if not rows or min(rows) < 1:
        raise ValueError(f"rows are the numbers of rows that calls will have, each at least 1; got {rows}")
    cells = packed.out_features * packed.in_features
    if native is None or packed.bitmask.device.type != "cpu" or cells == 0:
        return {}
    dtype = str(packed.values.dtype).removeprefix("torch.")
    case = case_of(packed.density, packed.out_features, packed.in_features, dtype, layout_of(packed).quads)
    known = {} if again else remembered(case)
    missing = [number for number in dict.fromkeys(rows) if number not in known]
    if missing:
        remember(case, {number: _times(packed, number) for number in missing})
    return {number: remembered(case)[number] for number in rows}


@torch.no_grad()
def _times(packed: PackedSparse, rows: int) -> dict[str, float]:
    x, layout = activations(rows, packed.in_features).to(packed.values.dtype), layout_of(packed)
    return alternate({name: functools.partial(run_route, name, x, layout, None) for name in candidates(rows)})


def activations(rows: int, in_features: int) -> Tensor:
    """Normally distributed activations to measure with, float32 [rows, in_features]."""
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0))


def alternate(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call: they take turns, and between two of them the caches are overwritten.

    >>> sorted(alternate({"nothing": lambda: None, "sort": lambda: sorted(range(1000))}))
    ['nothing', 'sort']
    """
    evict = torch.zeros(EVICT_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, MORE_ROUNDS):
        for name, call in calls.items():
            evict.add_(1)
            start = time.perf_counter()
            call()
            if turn >= 0:  # the first round makes the layouts
                seconds[name].append(time.perf_counter() - start)
        if turn + 1 >= ROUNDS and sum(map(statistics.median, seconds.values())) > SHORT_S:
            break
    return {name: statistics.median(found) * 1e6 for name, found in seconds.items()}


def gain(times: Times) -> float:
    """How many times faster than dense the best routes are: the geometric mean over the numbers of rows, at least 1.

    >>> gain({1: {"dense": 40.0, "panels": 10.0}, 16: {"dense": 50.0, "panels": 60.0}})
    2.0
    """
    ratios = [math.log(of["dense"] / min(of.values())) for of in times.values()]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
