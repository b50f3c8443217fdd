"""How much each weight matters: scores that pruning ranks and slicing adds up over channels, heads or neurons."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Absolute value of every weight, in float32 (Han et al. 2015, "Learning both weights and connections", section 3).

    Args:
        weight: any shape, floating point.

    Returns:
        Scores of the same shape, >= 0; a larger score matters more.

    Raises:
        ValueError: a weight is NaN or infinite, which no ranking can place.

    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    scores = weight.detach().float().abs()
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise ValueError(
            f"{bad} of {scores.numel()} weights are NaN or infinite and cannot be ranked; repair the model"
        )
    return scores


def masks_at_sparsity(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Boolean masks that keep the largest scores over all tensors together (global pruning).

    Exactly ``round(sparsity * n)`` of the n scores are pruned. Among equal scores those that come first, in the order
    of the mapping and then of the elements, are pruned first.

    Args:
        scores: name -> scores of any shape; larger matters more.
        sparsity: share to prune, in [0, 1].

    Returns:
        name -> boolean mask of the scores' shape, True = kept.

    Raises:
        ValueError: `sparsity` is outside [0, 1] or there is nothing to rank.

    >>> masks_at_sparsity({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0, 3.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is the share of weights to prune, between 0 and 1; got {sparsity}")
    if not scores:
        raise ValueError("no weights to rank: the filters exclude every layer; widen include or narrow exclude")
    flat = torch.cat([score.flatten() for score in scores.values()])
    prune = round(sparsity * flat.numel())
    kept = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    kept[torch.sort(flat, stable=True).indices[:prune]] = False
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
