"""Calibration: examples run through the model, layer after layer, and what each layer's inputs look like.

Layers are visited in the order in which the model runs them. For each, the examples run as far as that layer, its
statistics add up, its weight is replaced; so the next layer is measured behind the packed ones, with the inputs that it
will get, and one layer's statistics at a time are in memory. Linear layers that are given the very same tensor, as the
query, key and value of an attention, share one visit.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.calibration.inputs import Accumulator, Inputs
from pykd.data.bundle import DataBundle, permutation
from pykd.errors import DataError
from pykd.models.adapter import call, move
from pykd.nn import CompressedModule
from pykd.nn.selection import LINEAR, as_linear, transposed

Batch = Mapping[str, Any]
#: What calibration reads: a data set, or batches as the model takes them.
Data = DataBundle | Iterable[Batch | Tensor]


def calibration_batches(data: Data, *, samples: int, batch_size: int, seed: int = 0) -> list[Batch]:
    """At most `samples` examples as batches: drawn by `seed` from the training split of a DataBundle, or the first ones
    of an iterable of batches (dicts, or tensors for models that take one).

    Raises ValueError for samples or a batch size below 1, DataError for data that is empty or holds something else.

    >>> [len(b["pixel_values"]) for b in calibration_batches([torch.zeros(3, 8)] * 2, samples=4, batch_size=2)]
    [3, 1]
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a number of examples, at least 1, got {value!r}")
    if isinstance(data, DataBundle):
        order = permutation(len(data.train), seed=seed)[:samples]
        parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        return [data.collate([data.train[index] for index in part]) for part in parts]
    if not isinstance(data, Iterable) or isinstance(data, (Tensor, Mapping, str)):
        raise DataError(f"data must be a DataBundle or a list or loader of batches, got {type(data).__name__}")
    found: list[Batch] = []
    missing = samples
    for item in data:
        batch = {"pixel_values": item} if isinstance(item, Tensor) else item
        rows = [len(value) for value in _values(batch) if isinstance(value, Tensor) and value.dim()]
        if not rows:
            raise DataError(f"a batch is a tensor or a dict of tensors by input name, got {type(item).__name__}")
        found.append({k: v[:missing] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()})
        missing -= rows[0]
        if missing <= 0:
            break
    if not found:
        raise DataError("data holds no batches: an iterator that has run once is empty, pass a list or a loader")
    return found


def _values(batch: object) -> Iterable[Any]:
    return batch.values() if isinstance(batch, Mapping) else ()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    visit: Callable[[str, Inputs], None],
    *,
    hessian: bool = True,
    sample: bool = False,
) -> list[str]:
    """Call ``visit(name, inputs)`` for every named layer in order of execution; returns the names never reached.

    `visit` may replace the layer in the model. The model runs in evaluation mode. Positions that a batch's
    ``attention_mask`` calls padding are left out of the statistics of layers that see positions. `hessian` and `sample`
    say what is collected. Raises ValueError when
    a layer is given NaN or infinity.
    """
    from tqdm import tqdm

    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        runs = _survey(model, names, batches)
        with tqdm(total=len(runs.calls), desc="calibrate", unit="layer", disable=None) as bar:
            for party in _parties(runs):
                inputs = _measure(model, party[0], batches, runs.calls[party[0]], hessian=hessian, sample=sample)
                for name in party:
                    visit(name, inputs)
                del inputs
                bar.update(len(party))
    finally:
        for name, module in model.named_modules():  # also the layers that `visit` put in place of others
            module.training = training[name]
    return [name for name in names if name not in runs.calls]


class _Runs:
    """Which layers ran, in which order, how often in each batch, and which were given the tensor of the one before."""

    def __init__(self) -> None:
        self.calls: dict[str, list[int]] = {}
        self.shares: dict[str, str] = {}


def _survey(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> _Runs:
    """One pass over the batches that only looks who is called."""
    runs = _Runs()
    last: tuple[str, Tensor, int] | None = None

    def note(name: str, batch: int, x: Tensor) -> None:
        nonlocal last
        if name not in runs.calls:
            runs.calls[name] = [0] * len(batches)
            if last is not None and last[1] is x and last[2] == x._version and _both_linear(model, name, last[0]):
                runs.shares[name] = last[0]
        runs.calls[name][batch] += 1
        last = name, x, x._version

    for index, batch in enumerate(batches):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(_hook(model.get_submodule(name), functools.partial(note, name, index)))
            call(model, move(batch, _device(model)))
        last = None
    return runs


def _both_linear(model: nn.Module, *names: str) -> bool:
    return all(isinstance(model.get_submodule(name), (*LINEAR, *transposed())) for name in names)


def _parties(runs: _Runs) -> Iterator[list[str]]:
    """Neighbours that share their input, in order of execution."""
    party: list[str] = []
    for name, counts in runs.calls.items():
        if party and runs.shares.get(name) == party[-1] and counts == runs.calls[party[0]]:
            party.append(name)
            continue
        if party:
            yield party
        party = [name]
    if party:
        yield party


def _measure(model: nn.Module, name: str, batches: Sequence[Batch], calls: Sequence[int], **collected: bool) -> Inputs:
    """Run every batch as far as the layer's last call in it."""
    layer = model.get_submodule(name)
    accumulator = Accumulator(
        layer.to_dense() if isinstance(layer, CompressedModule) else as_linear(layer), **collected
    )
    for batch, count in zip(batches, calls, strict=True):
        if count:
            _feed(model, layer, move(batch, _device(model)), count, accumulator)
    inputs = accumulator.finish()
    ends = () if inputs.sample is None else (inputs.sample.low, inputs.sample.high)
    if not bool(inputs.hessian.isfinite().all()) or not all(map(math.isfinite, ends)):
        raise ValueError(
            f"calibration gives layer {name!r} NaN or infinite inputs: look at the data, or run the model in float32"
        )
    return inputs


class _EnoughError(BaseException):
    """Ends a forward pass once the layer has seen all that it gets; not an Exception, so that no model catches it."""


def _feed(model: nn.Module, layer: nn.Module, batch: Batch, count: int, accumulator: Accumulator) -> None:
    mask = batch.get("attention_mask")
    left = count

    def take(x: Tensor) -> None:
        nonlocal left
        accumulator.add(x, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        left -= 1
        if not left:
            raise _EnoughError

    with contextlib.suppress(_EnoughError), _hook(layer, take):
        call(model, batch)


@contextlib.contextmanager
def _hook(layer: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Give `take` the input of every call of the layer."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else next(iter(kwargs.values())))

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _device(model: nn.Module) -> torch.device:
    return next(iter([*model.parameters(), *model.buffers()])).device
