"""Layer pruning: whole layers of a transformer, removed so that the rest stays evenly spread."""

from __future__ import annotations

from torch import nn

from pykd.models.layer_choice import spaced_layers
from pykd.models.layers import keep_layers, layer_stacks
from pykd.nn.selection import matches
from pykd.nn.slicing import kept_count
from pykd.pruning.outcome import Outcome, Request


def prune_layers(model: nn.Module, request: Request) -> Outcome:
    """Remove whole layers of every stack, evenly spaced, the first and the last staying (cf. Fan et al. 2020).

    Layers that ``exclude`` names, or ``include`` does not, stay; the others keep the first and the last of them, at
    least one. The map to the original layers (``pykd.models.layers.layer_map``) follows. To choose by data, use
    ``derive(layers="influence")``.
    """
    outcome, kept = Outcome(), dict[str, list[int]]()
    for name, stack in layer_stacks(model).items():
        names = [f"{name}.{index}" for index in range(len(stack))]
        free = [index for index, layer in enumerate(names) if _free(layer, request, outcome)]
        if free:
            left = spaced_layers(len(free), kept_count(len(free), request.sparsity))
            gone = set(free) - {free[place] for place in left}
            kept[name] = [index for index in range(len(stack)) if index not in gone]
            outcome.changed[name] = [len(stack), len(kept[name])]
    if not kept:
        stacks = ", ".join(layer_stacks(model)) or "none found"
        raise ValueError(
            f"{type(model).__name__} has no layers to remove (stacks: {stacks}): "
            "widen include, narrow exclude, or use method='channels'"
        )
    keep_layers(model, kept)
    return outcome


def _free(layer: str, request: Request, outcome: Outcome) -> bool:
    excluding = next((pattern for pattern in request.exclude or () if matches(layer, pattern)), None)
    if excluding is not None:
        outcome.skipped[layer] = f"excluded by {excluding!r}"
        return False
    return request.include is None or any(matches(layer, pattern) for pattern in request.include)
