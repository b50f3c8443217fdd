"""Which layers of a teacher a shallower student keeps: by position, or by what each layer does to real data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import nearest
from pykd.models.adapter import call, logits, move
from pykd.models.layers import layer_stacks

Batches = Sequence[Mapping[str, Any]]


def spaced_layers(layers: int, depth: int) -> list[int]:
    """Indices of ``depth`` of ``layers`` layers, evenly spaced, the first and the last among them.

    >>> spaced_layers(12, 4)
    [0, 4, 7, 11]
    """
    return [0] if depth == 1 else [round(i * (layers - 1) / (depth - 1)) for i in range(depth)]


#: Choice by position -> indices kept of (layers, depth).
BY_POSITION: dict[str, Callable[[int, int], list[int]]] = {
    "spaced": spaced_layers,
    "first": lambda layers, depth: list(range(depth)),
    "last": lambda layers, depth: list(range(layers - depth, layers)),
}


def choose_layers(
    model: nn.Module, depth: int, how: str = "spaced", *, batches: Batches | None = None
) -> dict[str, list[int]]:
    """``depth`` layers of every stack of ``model``: a name in BY_POSITION, or in BY_DATA, which needs ``batches``.

    Raises ValueError for a model without layers, a depth out of range, an unknown choice, or missing batches.
    """
    stacks = layer_stacks(model)
    if not stacks:
        raise ValueError(
            f"depth={depth} needs a transformer; {type(model).__name__} has no stack of equal layers: use width"
        )
    for name, stack in stacks.items():
        if not 1 <= depth <= len(stack):
            raise ValueError(f"depth must be between 1 and the teacher's {len(stack)} layers in {name}, got {depth}")
    if how in BY_POSITION:
        return {name: BY_POSITION[how](len(stack), depth) for name, stack in stacks.items()}
    if how not in BY_DATA:
        raise ValueError(nearest("choice of layers", how, [*BY_POSITION, *BY_DATA]))
    if not batches:
        raise ValueError(f"layers={how!r} is measured on data: pass batches, some dicts of inputs and labels")
    scores = BY_DATA[how](model, batches)
    return {
        name: sorted(score.argsort(descending=True, stable=True)[:depth].tolist()) for name, score in scores.items()
    }


def block_influence(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """How far each layer turns the hidden states (ShortGPT, Men et al. 2024, arXiv 2403.03853, eq. 1).

    BI = 1 - mean over positions of cos(x_in, x_out), float64 [layers] per stack, >= 0; a layer near 0 can go. Positions
    that attention_mask leaves out do not count where its shape is that of the layer's positions.
    """
    stacks = layer_stacks(model)
    sums = {name: torch.zeros(len(stack), 2, dtype=torch.float64) for name, stack in stacks.items()}
    mask: Tensor | None = None

    def watch(total: Tensor) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            if mask is not None and mask.shape == cosine.shape:
                cosine = cosine[mask.bool()]
            total.add_(torch.tensor([float((1 - cosine).sum()), cosine.numel()], dtype=torch.float64))

        return hook

    handles = [
        layer.register_forward_hook(watch(sums[name][index]), with_kwargs=True)
        for name, stack in stacks.items()
        for index, layer in enumerate(stack)
    ]
    try:
        with _measuring(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                call(model, move(batch, next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total[:, 0] / total[:, 1] for name, total in sums.items()}


def skip_divergence(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """How much the outputs change when a layer is skipped: KL(model || model without it), mean over positions.

    float64 [layers] per stack, >= 0. One pass over the batches for every layer. Positions whose label is -100 do not
    count.
    """
    stacks = layer_stacks(model)
    found = {name: torch.zeros(len(stack), dtype=torch.float64) for name, stack in stacks.items()}
    with _measuring(model):
        whole = [_log_p(model, batch) for batch in batches]
        rows = sum(len(scores) for scores in whole)
        for name, stack in stacks.items():
            every = dict(stack._modules)
            for index in range(len(every)):
                stack._modules = {key: layer for key, layer in every.items() if key != str(index)}
                try:
                    for batch, want in zip(batches, whole, strict=True):
                        got = _log_p(model, batch)
                        found[name][index] += float((want.exp() * (want - got)).sum()) / rows
                finally:
                    stack._modules = every
    return found


#: Choice by measurement -> scores of every layer; the highest are kept.
BY_DATA: dict[str, Callable[[nn.Module, Batches], dict[str, Tensor]]] = {
    "influence": block_influence,
    "divergence": skip_divergence,
}


def _log_p(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Log probabilities (positions, classes) where a label counts."""
    batch = move(batch, next(model.parameters()).device)
    scores = logits(model, batch).float()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == scores.shape[:-1]:
        scores = scores[labels != -100]
    return scores.flatten(0, -2).log_softmax(-1)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no cache of keys and values, and all of it as before afterwards."""
    training, config = model.training, getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    model.eval()
    try:
        if caching is not None:
            config.use_cache = False  # type: ignore[union-attr]
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if caching is not None:
            config.use_cache = caching  # type: ignore[union-attr]
