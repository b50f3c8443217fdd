"""What the methods that remove single weights share: which layers, masks from scores, and the layers made sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pykd.models.layers import layer_stacks
from pykd.nn.importance import (
    Block,
    Pattern,
    mask_of_pattern,
    mask_of_rows,
    masks_at_sparsity,
    pooled,
    unpooled,
)
from pykd.nn.selection import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    Selection,
    as_linear,
    replace_layer,
    select_layers,
    transposed,
    uncovered,
)
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning.outcome import Outcome, Request

#: Over which weights the share is met.
SCOPES = ("global", "layer", "row")


def select_weights(
    model: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    pattern: Pattern | Block | None = None,
    others: tuple[type[nn.Module], ...] = (),
) -> Selection:
    """The layers whose weights may go, in module order; ``others``: classes of layers beside the usual ones.

    By default those of a transformer's attention and feed-forward blocks, so neither embeddings nor poolers nor heads,
    and of other networks all but the output head. Layers whose rows a pattern does not divide are left out. What else
    holds a hundredth of the weights there, such as experts in one tensor, is named with the layers left alone.
    """
    kinds = (*LINEAR, *CONVOLUTION, *transposed(), *others)
    selection = select_layers(model, kinds, include=include, exclude=exclude)
    stacks = tuple(f"{name}." for name in layer_stacks(model))
    attends = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())  # torchvision's transformers
    for name in list(selection.chosen):
        columns = matrix_of(selection.chosen[name]).shape[1]
        if include is None and stacks and not name.startswith(stacks):
            selection.skipped[name] = "outside the transformer's layers"
        elif include is None and attends and isinstance(selection.chosen[name], CONVOLUTION):
            selection.skipped[name] = "embeds the patches of a transformer"
        elif isinstance(pattern, Pattern) and columns % pattern.group:
            selection.skipped[name] = f"its {columns} inputs are no multiple of {pattern.group}"
        else:
            continue
        del selection.chosen[name]
    if not selection.chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(selection.skipped.items())[:3])
        raise ValueError(f"no layer of {type(model).__name__} is left to prune ({why}): widen include")
    if include is None:
        share = sum(parameter.nbytes for parameter in model.parameters()) // 100
        left = uncovered(model, (*kinds, *EMBEDDING), share, form="sparse")
        selection.skipped.update((name, why) for name, why in left.items() if not stacks or name.startswith(stacks))
    return selection


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight as [outputs, inputs of one output]."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if isinstance(layer, transposed()) else weight.flatten(1)


def masks_of(scores: Mapping[str, Tensor], request: Request, *, scope: str) -> dict[str, Tensor]:
    """Boolean masks, True = kept, of matrices of scores (larger matters more), by the pattern or in the scope."""
    if isinstance(request.pattern, Pattern):
        return {name: mask_of_pattern(matrix, request.pattern) for name, matrix in scores.items()}
    if request.pattern is not None:
        block, blocks = request.pattern, replace(request, pattern=None)
        found = masks_of({name: pooled(matrix, block) for name, matrix in scores.items()}, blocks, scope=scope)
        return {name: unpooled(mask, block, scores[name].shape) for name, mask in found.items()}
    if scope == "global":
        return masks_at_sparsity(scores, request.sparsity)
    if scope == "layer":
        return {name: masks_at_sparsity({name: matrix}, request.sparsity)[name] for name, matrix in scores.items()}
    return {name: mask_of_rows(matrix, request.sparsity) for name, matrix in scores.items()}


@torch.no_grad()
def prune_by_score(
    model: nn.Module, request: Request, score: Callable[[str, Tensor], Tensor], *, scope: str = "global"
) -> Outcome:
    """Remove the weights with the smallest ``score(name, weight matrix)`` and make their layers sparse."""
    selection = select_weights(model, include=request.include, exclude=request.exclude, pattern=request.pattern)
    scores = {name: score(name, matrix_of(layer)) for name, layer in selection.chosen.items()}
    masks = masks_of(scores, request, scope=request.scope or scope)
    del scores
    outcome = Outcome(skipped=selection.skipped)
    for name, layer in selection.chosen.items():
        make_sparse(model, name, layer, masks.pop(name), request, outcome)
    return outcome


def make_sparse(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    mask: Tensor,
    request: Request,
    outcome: Outcome,
    weight: Tensor | None = None,
) -> None:
    """Replace a layer by its sparse form, with ``weight`` [outputs, inputs] for its values where one is given.

    A layer that loses nothing stays as it is.
    """
    if bool(mask.all()):
        outcome.skipped[name] = "none of its weights is among those that go"
        return
    sparse = sparse_layer(layer, mask, weight)
    replace_layer(model, layer, sparse)
    facts: dict[str, Any] = {"sparsity": round(1 - mask.float().mean().item(), 4)}
    if request.rows is not None and not (isinstance(sparse, SparseConv2d) and not sparse.pointwise):
        facts.update(sparse.tune(request.rows))
    outcome.changed[name] = facts


@torch.no_grad()
def sparse_layer(layer: nn.Module, mask: Tensor, weight: Tensor | None = None) -> SparseLinear | SparseConv2d:
    """The sparse form of a dense or sparse layer; mask and weight as matrices [outputs, inputs]."""
    dense = layer.to_dense() if isinstance(layer, (SparseLinear, SparseConv2d)) else as_linear(layer)
    assert isinstance(dense, (nn.Linear, nn.Conv2d))
    shape = dense.weight.shape
    if weight is not None:
        trains = dense.weight.requires_grad
        dense = dense if dense is not layer else _shell(dense)
        dense.weight = nn.Parameter(weight.to(dense.weight.dtype).view(shape), requires_grad=trains)
    if isinstance(dense, nn.Conv2d):
        return SparseConv2d.from_conv2d(dense, mask=mask.view(shape))
    return SparseLinear.from_linear(dense, mask=mask)


def _shell(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Another layer with the same parameters, so that the model's own is not touched."""
    shell = type(layer).__new__(type(layer))
    shell.__dict__.update(layer.__dict__)
    shell._parameters = dict(layer._parameters)
    return shell
