"""What a model costs beside its file: operations, memory, and which of its parts the weights are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pykd.evaluation.counting import count_parameters
from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import logits, move, unwrap
from pykd.nn.compressed import CompressedModule

#: Width of a weight -> bits.
WIDTHS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
#: Where Linux keeps a process's memory, and the file that resets its high-water mark.
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def theoretical_bytes(parameters: int) -> dict[str, int]:
    """Bytes of that many weights at each width, without scales, names or alignment.

    >>> theoretical_bytes(1001)
    {'fp32': 4004, 'fp16': 2002, 'int8': 1001, 'int4': 501}
    """
    return {name: -(-parameters * bits // 8) for name, bits in WIDTHS.items()}


def components(model: nn.Module) -> dict[str, int]:
    """Parameters of each part of a model, counted as :func:`count_parameters` does; parts that hold none are left out.

    A part is a child of the model; one that holds more than half of all weights is shown by its own children.

    >>> components(nn.Sequential(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 8)), nn.Linear(8, 2)))
    {'0.0': 90, '0.1': 80, '1': 18}
    """
    whole, _ = count_parameters(model)
    found: dict[str, int] = {}

    def add(module: nn.Module, name: str) -> None:
        count, _ = count_parameters(module)
        children = list(module.named_children())
        own = any(True for _ in module.parameters(recurse=False))
        if children and not own and 2 * count > whole and not isinstance(module, CompressedModule):
            for child, inner in children:
                add(inner, f"{name}.{child}" if name else child)
        elif count:
            found[name] = count

    add(unwrap(model), "")
    return found


def count_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of a forward pass: 2 for each multiply-add of matrix products, convolutions, attention.

    Compressed layers count as the products of the layer that they compute, sparse ones without their zeros.

    >>> count_flops(nn.Linear(10, 5), {"x": torch.zeros(3, 10)})
    300
    """
    extra = 0
    counter = FlopCounterMode(display=False)
    before: list[int] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        before.append(counter.get_total_flops())

    def leave(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal extra
        counted = counter.get_total_flops() - before.pop()
        extra += _products(module, output) - counted

    hooks = []
    for module in model.modules():
        if isinstance(module, CompressedModule) and hasattr(module, "bias"):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with evaluating(model), counter:
            logits(model, move(batch, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return int(counter.get_total_flops()) + extra


def peak_memory(model: nn.Module, batch: Mapping[str, Any]) -> int | None:
    """Bytes of the model's tensors and the most that a forward pass takes beside them; None where it cannot be read.

    On a GPU by torch's allocator; on Linux by the high-water mark of the process, of which other threads are a part.
    """
    device = device_of(model)
    ready = move(batch, device)
    with evaluating(model):
        logits(model, ready)  # packing and workspaces of a first call are not its peak
        with _watched(device) as peak:
            logits(model, ready)
    if not peak:
        return None
    return resident_bytes(model) + max(0, peak[0])


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory, shared ones once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """The list holds, afterwards, how far memory rose inside; nothing where it cannot be read."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - start)
        return
    try:
        RESET.write_text("5", encoding="ascii")  # the high-water mark begins again at what is in use
        start = _high_water()
    except OSError:
        yield peak
        return
    yield peak
    peak.append(_high_water() - start)


def _high_water() -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _products(module: nn.Module, output: Tensor) -> int:
    """Operations of a compressed linear layer or convolution: 2 a weight and output position; of embeddings none."""
    if not hasattr(module, "in_features") and not hasattr(module, "in_channels"):
        return 0
    kept = getattr(module, "values", None)
    weights = int(kept.numel()) if isinstance(kept, Tensor) else module.dequantize().numel()  # type: ignore[operator]
    shape: Any = module
    channels = int(shape.out_channels if hasattr(module, "out_channels") else shape.out_features)
    return 2 * weights * (output.numel() // channels)
