"""Global magnitude pruning: the smallest weights of all layers together."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pykd.nn.importance import magnitude, masks_at_sparsity
from pykd.nn.selection import CONVOLUTION, LINEAR, replace_layer, select_layers
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning.outcome import Outcome, Request


@torch.no_grad()
def prune_magnitude(model: nn.Module, request: Request) -> Outcome:
    """Remove the smallest weights over all chosen layers (Han et al. 2015) and make those layers sparse.

    Exactly ``round(sparsity * weights)`` go; weights that are zero already count among them. Layers become SparseLinear
    and SparseConv2d, whose parameter holds only kept weights: training cannot bring a removed one back. A layer that
    loses nothing stays dense.
    """
    selection = select_layers(model, (*LINEAR, *CONVOLUTION), include=request.include, exclude=request.exclude)
    scores = {name: magnitude(cast(Tensor, module.weight)) for name, module in selection.chosen.items()}
    masks = masks_at_sparsity(scores, request.sparsity)
    del scores
    outcome = Outcome(skipped=selection.skipped)
    for name, module in selection.chosen.items():
        mask = masks.pop(name)
        if bool(mask.all()):
            outcome.skipped[name] = "none of its weights is among the smallest"
            continue
        layer = _sparse(module, mask)
        replace_layer(model, module, layer)
        outcome.changed[name] = {"sparsity": round(1 - mask.float().mean().item(), 4)}
        if request.rows is not None and not (isinstance(layer, SparseConv2d) and not layer.pointwise):
            outcome.changed[name].update(layer.tune(request.rows))
    return outcome


def _sparse(module: nn.Module, mask: Tensor) -> SparseLinear | SparseConv2d:
    dense = module.to_dense() if isinstance(module, (SparseLinear, SparseConv2d)) else module
    if isinstance(dense, nn.Conv2d):
        return SparseConv2d.from_conv2d(dense, mask=mask)
    assert isinstance(dense, nn.Linear)
    return SparseLinear.from_linear(dense, mask=mask)
