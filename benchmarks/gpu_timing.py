"""Times and memory on an NVIDIA GPU, as the device sees them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gpu_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bytes_per_s(tensor: Tensor, rounds: int) -> float:
    """Read plus written bytes a second of a device-to-device copy of this tensor: the limit of what streams memory."""
    target = torch.empty_like(tensor)
    times = [gpu_seconds(lambda: target.copy_(tensor)) for _ in range(rounds + 2)]
    return 2 * tensor.nbytes / statistics.median(times)


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Most memory that a call holds above what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def captured(call: Callable[[int], Any], turns: int) -> Callable[[], None]:
    """The calls of all turns as one CUDA graph, to be replayed: kernels without the host's time between them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles or tunes itself does so before
        for turn in range(turns):
            call(turn)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            call(turn)
    return graph.replay
