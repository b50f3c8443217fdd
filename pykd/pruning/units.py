"""Head and neuron pruning: attention heads and feed-forward neurons of transformers, removed physically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pykd.nn import slicing
from pykd.nn.family_config import update_config
from pykd.nn.selection import matches
from pykd.pruning.outcome import Outcome, Request


def prune_heads(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest heads of every attention block (L2 norm of their weights; cf. Michel et al. 2019).

    With grouped-query attention a unit is one key/value head and the query heads that share it. One unit always stays.
    """
    blocks = slicing.attention_blocks(model)
    return _prune(model, request, blocks, "attention heads", slicing.head_scores, slicing.keep_heads)


def prune_neurons(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest hidden neurons of every feed-forward block (L2 norm of their weights). One always stays."""
    blocks = slicing.feed_forward_blocks(model)
    return _prune(model, request, blocks, "feed-forward neurons", slicing.neuron_scores, slicing.keep_neurons)


def _prune(
    model: nn.Module,
    request: Request,
    blocks: Sequence[Any],
    what: str,
    score: Callable[[Any], Tensor],
    keep: Callable[[Any, list[int]], None],
) -> Outcome:
    outcome = Outcome()
    for block in blocks:
        excluding = next((pattern for pattern in request.exclude or () if matches(block.name, pattern)), None)
        if excluding is not None:
            outcome.skipped[block.name] = f"excluded by {excluding!r}"
        elif request.include is None or any(matches(block.name, pattern) for pattern in request.include):
            before = block.units
            keep(block, slicing.strongest(score(block), slicing.kept_count(before, request.sparsity)))
            outcome.changed[block.name] = [before, block.units]
    if not outcome.changed:
        names = ", ".join(block.name for block in blocks[:3]) or "none found"
        raise ValueError(
            f"{type(model).__name__} has no {what} to remove (blocks: {names}): widen include, narrow exclude, or "
            "prune structure before weights are made sparse or quantized"
        )
    update_config(model)
    return outcome
