"""Random pruning: any weights, as the control that every other method has to beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.weights import prune_by_score


def random_scores(weight: Tensor, *, seed: int) -> Tensor:
    """Uniform scores in [0, 1) of a weight's shape, the same for the same seed; 0 where the weight is zero already.

    >>> bool((random_scores(torch.ones(4), seed=1) == random_scores(torch.ones(4), seed=1)).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device) * (weight != 0)


def prune_random(model: nn.Module, request: Request) -> Outcome:
    """Remove weights at random, drawn by the request's seed and the layer's name."""
    return prune_by_score(
        model, request, lambda name, weight: random_scores(weight, seed=request.seed + zlib.crc32(name.encode()))
    )
