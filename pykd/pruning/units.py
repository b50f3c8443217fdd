"""Head and neuron pruning: attention heads and feed-forward neurons of transformers, removed physically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pykd.nn import slicing
from pykd.nn.family_config import update_config
from pykd.nn.selection import as_linear, matches, replace_layer, transposed
from pykd.pruning.measured import activations, taylor
from pykd.pruning.outcome import Outcome, Request


def prune_heads(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest heads of every attention block (cf. Michel et al. 2019), by default by the L2 norm of weights.

    With grouped-query attention a unit is one key/value head and the query heads that share it. One unit always stays.
    """
    return _prune(model, request, slicing.attention_blocks, "attention heads", slicing.head_scores, slicing.keep_heads)


def prune_neurons(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest hidden neurons of every feed-forward block, by default by the L2 norm of their weights. One
    always stays."""
    return _prune(
        model, request, slicing.feed_forward_blocks, "feed-forward neurons", slicing.neuron_scores, slicing.keep_neurons
    )


def _prune(
    model: nn.Module,
    request: Request,
    find: Callable[[nn.Module], Sequence[Any]],
    what: str,
    norm: Callable[..., Tensor],
    keep: Callable[[Any, list[int]], None],
) -> Outcome:
    for layer in [module for module in model.modules() if isinstance(module, transposed())]:
        replace_layer(model, layer, as_linear(layer))
    outcome, blocks, chosen = Outcome(), find(model), list[Any]()
    for block in blocks:
        excluding = next((pattern for pattern in request.exclude or () if matches(block.name, pattern)), None)
        if excluding is not None:
            outcome.skipped[block.name] = f"excluded by {excluding!r}"
        elif request.include is None or any(matches(block.name, pattern) for pattern in request.include):
            chosen.append(block)
    if not chosen:
        names = ", ".join(block.name for block in blocks[:3]) or "none found"
        raise ValueError(
            f"{type(model).__name__} has no {what} to remove (blocks: {names}): widen include, narrow exclude, or "
            "prune structure before weights are made sparse or quantized"
        )
    for block, scores in zip(chosen, _scores(model, request, chosen, norm), strict=True):
        before = block.units
        keep(block, slicing.strongest(scores, slicing.kept_count(before, request.sparsity)))
        outcome.changed[block.name] = [before, block.units]
    update_config(model)
    return outcome


def _scores(model: nn.Module, request: Request, blocks: Sequence[Any], norm: Callable[..., Tensor]) -> list[Tensor]:
    """Scores of each block's units. A unit's gate is what its output projection reads."""
    if request.importance in ("l1", "l2"):
        return [norm(block, norm=int(request.importance[1])) for block in blocks]
    batches = request.batches(f"importance={request.importance!r}")
    if request.importance == "activation":
        found = activations(model, [block.output for block in blocks], batches)
        return [found[block.output].view(block.units, -1).mean(1) for block in blocks]
    sizes = {block.output: block.units for block in blocks}
    gates = {layer: _gate(units) for layer, units in sizes.items()}
    costs = taylor(model, gates, batches)
    return [costs[block.output] for block in blocks]


def _gate(units: int) -> Callable[[Tensor], Tensor]:
    return lambda product: product.sum(0).view(units, -1).sum(1)
