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


class Block(NamedTuple):
    """Weights that are kept or removed together: so many neighbouring outputs times so many neighbouring inputs."""

    rows: int
    columns: int


def pattern_of(text: object) -> Pattern | Block:
    """The pattern that a text like "2:4" or "4x1" names.

    Raises:
        ValueError: it is no such text, or keeps none or all of the group, or a block is a single weight.

    >>> pattern_of("1:4"), pattern_of("16x8")
    (Pattern(kept=1, group=4), Block(rows=16, columns=8))
    """
    found = re.fullmatch(r"(\d+)([:x])(\d+)", text) if isinstance(text, str) else None
    if found is not None:
        first, second = int(found[1]), int(found[3])
        if found[2] == ":" and 0 < first < second:
            return Pattern(first, second)
        if found[2] == "x" and first * second > 1:
            return Block(first, second)
    raise ValueError(
        "pattern is N:M, N weights kept of M neighbours, as '2:4' or '1:4', or RxC, blocks of outputs and inputs that "
        f"go together, as '4x1' or '16x16'; got {text!r}"
    )


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


def pooled(scores: Tensor, block: Block) -> Tensor:
    """Mean score of each block, [ceil(rows / block.rows), ceil(columns / block.columns)]; at the edges of a part.

    >>> pooled(torch.tensor([[1.0, 3.0, 5.0]]), Block(1, 2))
    tensor([[2., 5.]])
    """
    options = {"kernel_size": block, "ceil_mode": True}
    result: Tensor = torch.nn.functional.avg_pool2d(scores[None, None], **options)[0, 0]  # type: ignore[arg-type]
    return result


def unpooled(mask: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """The mask of all weights [rows, columns] from that of their blocks."""
    whole = mask.repeat_interleave(block.rows, 0).repeat_interleave(block.columns, 1)
    return whole[: shape[0], : shape[1]]
