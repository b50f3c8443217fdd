"""Calibration: examples run through the model, layer after layer, and what each layer's inputs look like.

Layers are visited in the order in which the model runs them. For each, the examples run as far as that layer, its
statistics add up, its weight is replaced; so the next layer is measured behind the packed ones, with the inputs that it
will get, and one layer's statistics at a time are in memory. Linear layers that are given the very same tensor, as the
query, key and value of an attention, share one visit. Where the model can be cut into blocks, the examples run through
one block at a time, on inputs that are kept from the block before; elsewhere from the model's beginning on.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.calibration.blocks import Survey, candidates
from pykd.calibration.inputs import Accumulator, Inputs
from pykd.calibration.walk import EnoughError, Run, Walk, hooked
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

    `visit` may replace the layer in the model, and no other. The model runs in evaluation mode, without a cache of keys
    and values. Positions that a batch's ``attention_mask`` calls padding are left out of the statistics of layers that
    see positions. `hessian` and `sample` say what is collected. Every block of the model (`pykd.calibration.blocks`)
    runs a few times, whatever the depth, and the inputs and outputs of one block for all examples are in memory.

    Raises ValueError when a layer is given NaN or infinity.
    """
    from tqdm import tqdm

    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with _without_cache(model):
            survey = _survey(model, names, batches)
            with tqdm(total=len(survey.calls), desc="calibrate", unit="layer", disable=None) as bar:

                def measure(party: list[str], run: Run) -> None:
                    inputs = _measure(model, party[0], batches, survey, run, hessian=hessian, sample=sample)
                    for name in party:
                        visit(name, inputs)
                    bar.update(len(party))

                Walk(model, survey, measure).through((), lambda index: _run(model, batches[index]))
    finally:
        for name, module in model.named_modules():  # also the layers that `visit` put in place of others
            module.training = training[name]
    return [name for name in names if name not in survey.calls]


def _run(model: nn.Module, batch: Batch) -> None:
    call(model, move(batch, _device(model)))


def _survey(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Survey:
    """One pass over the batches that only looks who is called, and with what."""
    survey, alike = Survey(len(batches)), functools.partial(_both_linear, model)
    with contextlib.ExitStack() as stack:
        for name, module in candidates(model).items():
            enter = functools.partial(survey.enter, name, module)
            stack.enter_context(hooked(module, enter))
            leave = module.register_forward_hook(lambda _, args, output: survey.leave(output))
            stack.callback(leave.remove)
        for name in names:
            note = functools.partial(survey.layer, name, alike=alike)
            stack.enter_context(_hook(model.get_submodule(name), note))
        for index, batch in enumerate(batches):
            survey.begin(index)
            _run(model, batch)
    survey.end()
    return survey


def _both_linear(model: nn.Module, *names: str) -> bool:
    return all(isinstance(model.get_submodule(name), (*LINEAR, *transposed())) for name in names)


def _measure(
    model: nn.Module, name: str, batches: Sequence[Batch], survey: Survey, run: Run, **collected: bool
) -> Inputs:
    """Run every batch as far as the layer's last call in it."""
    layer = model.get_submodule(name)
    accumulator = Accumulator(
        layer.to_dense() if isinstance(layer, CompressedModule) else as_linear(layer), **collected
    )
    for index, count in enumerate(survey.calls[name]):
        if count:
            mask = move(batches[index], _device(model)).get("attention_mask")
            _feed(layer, functools.partial(run, index), count, accumulator, mask)
    inputs = accumulator.finish()
    ends = () if inputs.sample is None else (inputs.sample.low, inputs.sample.high)
    if not bool(inputs.hessian.isfinite().all()) or not all(map(math.isfinite, ends)):
        raise ValueError(
            f"calibration gives layer {name!r} NaN or infinite inputs: look at the data, or run the model in float32"
        )
    return inputs


def _feed(layer: nn.Module, run: Callable[[], Any], count: int, accumulator: Accumulator, mask: Any) -> None:
    left = count

    def take(x: Tensor) -> None:
        nonlocal left
        accumulator.add(x, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        left -= 1
        if not left:
            raise EnoughError

    with contextlib.suppress(EnoughError), _hook(layer, take):
        run()


def _hook(layer: nn.Module, take: Callable[[Tensor], None]) -> contextlib.AbstractContextManager[None]:
    """Give `take` the input of every call of the layer."""
    return hooked(layer, lambda args, kwargs: take(args[0] if args else next(iter(kwargs.values()))))


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values kept for later tokens would tie the blocks together, and nothing is generated."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caching = [config for config in found.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _device(model: nn.Module) -> torch.device:
    return next(iter([*model.parameters(), *model.buffers()])).device
