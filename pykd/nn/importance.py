"""How much each weight matters: scores that pruning ranks and slicing adds up over channels, heads or neurons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """N:M sparsity: of every `group` neighbouring inputs of an output, `kept` stay (Mishra et al. 2021)."""

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that goes."""
        return 1 - self.kept / self.group


def pattern_of(text: object) -> Pattern:
    """The pattern that a text like "2:4" names.

    Raises:
        ValueError: it is no such text, or keeps none or all of the group.

    >>> pattern_of("1:4")
    Pattern(kept=1, group=4)
    """
    found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"pattern is N:M, N weights kept of M neighbours, as '2:4' or '1:4'; got {text!r}")
    return Pattern(int(found[1]), int(found[2]))


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


def mask_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Boolean mask that keeps the largest scores of every row: ``round(sparsity * columns)`` of each go.

    Args:
        scores: [rows, columns]; larger matters more. Among equal ones those that come first go first.
        sparsity: share to prune, in [0, 1].

    >>> mask_of_rows(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    count = round(sparsity * scores.shape[1])
    order = torch.sort(scores, dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def mask_of_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Boolean mask that keeps the `pattern.kept` largest scores of every `pattern.group` neighbours in a row.

    Args:
        scores: [rows, columns], columns a multiple of the group; larger matters more.

    Raises:
        ValueError: the columns are no multiple of the group.

    >>> mask_of_pattern(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), Pattern(2, 4))
    tensor([[False,  True,  True, False]])
    """
    rows, columns = scores.shape
    if columns % pattern.group:
        raise ValueError(f"a pattern of {pattern.group} neighbours divides no row of {columns} inputs")
    groups = mask_of_rows(scores.reshape(-1, pattern.group), pattern.sparsity)
    return groups.view(rows, columns)
