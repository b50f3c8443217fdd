"""Head and neuron pruning: attention heads and feed-forward neurons of transformers, removed physically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import call, move
from pykd.models.example import example_batch
from pykd.nn import CompressedModule, slicing
from pykd.nn.bound_heads import bound_blocks, ties
from pykd.nn.family_config import update_config
from pykd.nn.restored import restored_on_error
from pykd.nn.selection import as_linear, matches, replace_layer, transposed
from pykd.pruning.measured import activations, taylor
from pykd.pruning.outcome import Outcome, Request


def prune_heads(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest heads of every attention block (cf. Michel et al. 2019), by default by the L2 norm of weights.

    With grouped-query attention a unit is one key/value head and the query heads that share it. One unit always stays.
    Blocks that share a position bias (T5) lose the same heads.
    """
    return _prune(model, request, _attention, "attention heads", slicing.head_scores, slicing.keep_heads)


def prune_neurons(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest hidden neurons of every feed-forward block, by default by the L2 norm of their weights. One
    always stays."""
    return _prune(model, request, _feed_forward, "feed-forward neurons", slicing.neuron_scores, slicing.keep_neurons)


def _attention(model: nn.Module) -> list[list[Any]]:
    return ties([*slicing.attention_blocks(model), *bound_blocks(model)])


def _feed_forward(model: nn.Module) -> list[list[Any]]:
    return [[block] for block in slicing.feed_forward_blocks(model)]


def _prune(
    model: nn.Module,
    request: Request,
    find: Callable[[nn.Module], list[list[Any]]],
    what: str,
    norm: Callable[..., Tensor],
    keep: Callable[[Any, list[int]], None],
) -> Outcome:
    """find: groups of blocks that keep the same units."""
    ran = _runs(model, request)
    with restored_on_error(model):
        for layer in [module for module in model.modules() if isinstance(module, transposed())]:
            replace_layer(model, layer, as_linear(layer))
        outcome, groups = Outcome(), find(model)
        chosen = [group for group in groups if _free(group, request, outcome)]
        if not chosen:
            raise ValueError(_nothing_to_remove(model, what, groups))
        scores = _scores(model, request, [block for group in chosen for block in group], norm)
        for group in chosen:
            before = group[0].units
            together = torch.stack([_shares(scores[block.name]) for block in group]).sum(0)
            kept = slicing.strongest(together, slicing.kept_count(before, request.sparsity))
            for block in group:
                keep(block, kept)
                outcome.changed[block.name] = [before, block.units]
        outcome.units = [[block.name for block in group] for group in chosen]
        update_config(model)
        if ran and not _runs(model, request):
            raise ValueError(
                f"{type(model).__name__} does not run without these {what}: something beside its blocks depends on how "
                "many there are; nothing was changed. Use method='magnitude' or method='layers'"
            )
    return outcome


def _runs(model: nn.Module, request: Request) -> bool:
    """Whether the model takes a small batch."""
    try:
        batch = request.example if isinstance(request.example, dict) else example_batch(model)
        with evaluating(model):
            call(model, move(batch, device_of(model)))
    except Exception:  # of a model's own code, which may want inputs that nobody here knows of
        return False
    return True


def _nothing_to_remove(model: nn.Module, what: str, groups: Sequence[Sequence[Any]]) -> str:
    """Why, and what to do instead."""
    sentence = f"{type(model).__name__} has no {what} to remove"
    if groups:
        names = ", ".join(group[0].name for group in groups[:3])
        return f"{sentence} (blocks: {names}): widen include, or narrow exclude"
    if any(isinstance(module, CompressedModule) for module in model.modules()):
        return f"{sentence}: prune structure before weights are made sparse or quantized"
    kinds = sorted({type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__})
    if what == "attention heads" and kinds:
        return (
            f"{sentence}: {', '.join(kinds)} has other projections than one each, or a fused one, that make query, key "
            "and value head by head, or something beside them that depends on heads; use method='neurons', 'layers' or "
            "'magnitude'"
        )
    return f"{sentence}: none of its modules has the projections of a family in pykd.nn.slicing; use method='magnitude'"


def _free(group: Sequence[Any], request: Request, outcome: Outcome) -> bool:
    """Whether the patterns admit all blocks of a group; those that are excluded are noted."""
    for block in group:
        excluding = next((pattern for pattern in request.exclude or () if matches(block.name, pattern)), None)
        if excluding is not None:
            reason = f"excluded by {excluding!r}"
            outcome.skipped.update((other.name, reason) for other in group)
            return False
    admitted = request.include is None or all(
        any(matches(block.name, pattern) for pattern in request.include) for block in group
    )
    return admitted


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.mean().clamp_min(torch.finfo(torch.float32).tiny)


def _scores(
    model: nn.Module, request: Request, blocks: Sequence[Any], norm: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Scores of each block's units, by its name. A unit's gate is what its output projection reads."""
    if request.importance in ("l1", "l2"):
        return {block.name: norm(block, norm=int(request.importance[1])) for block in blocks}
    batches = request.batches(f"importance={request.importance!r}")
    if request.importance == "activation":
        found = activations(model, [block.output for block in blocks], batches)
        return {block.name: found[block.output].view(block.units, -1).mean(1) for block in blocks}
    costs = taylor(model, {block.output: _gate(block.units) for block in blocks}, batches)
    return {block.name: costs[block.output] for block in blocks}


def _gate(units: int) -> Callable[[Tensor], Tensor]:
    return lambda product: product.sum(0).view(units, -1).sum(1)
