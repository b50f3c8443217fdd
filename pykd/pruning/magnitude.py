"""Magnitude pruning: the smallest weights, of all layers together, of each layer, or of each output."""

from __future__ import annotations

from torch import nn

from pykd.nn.importance import magnitude
from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.weights import prune_by_score


def prune_magnitude(model: nn.Module, request: Request) -> Outcome:
    """Remove the smallest weights (Han et al. 2015), over all chosen layers by default, and make those layers sparse.

    In scope "global" exactly ``round(sparsity * weights)`` go, and weights that are zero already count among them.
    Layers become SparseLinear and SparseConv2d, whose parameter holds only kept weights: training cannot bring a
    removed one back. A layer that loses nothing stays dense.
    """
    return prune_by_score(model, request, lambda name, weight: magnitude(weight))
