"""SparseGPT: weights that go, and kept weights that make up for them, by the second moments of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pykd.calibration import Inputs
from pykd.calibration.hessian import check_hessian, damped, inverse_root
from pykd.nn.importance import Block, Pattern, mask_of_pattern, masks_at_sparsity, pooled, unpooled
from pykd.pruning.calibrated import prune_layer_by_layer
from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.refit import refit


def sparsegpt(
    weight: Tensor,
    inputs: Inputs,
    *,
    sparsity: float,
    pattern: Pattern | Block | None = None,
    block: int = 128,
    damping: float = 0.01,
    refits: int = 32,
) -> tuple[Tensor, Tensor]:
    """Choose what goes by the error of the layer's outputs (Frantar and Alistarh 2023, SparseGPT, algorithm 1).

    Minimises ``e H e^T`` with e = weight - pruned weight and H = ``inputs.hessian``: the squared error of the outputs
    on the calibration inputs. Block of columns after block, the weights with the smallest ``w^2 / U_jj^2`` go, with
    ``H^-1 = U^T U``, and what each removal changes is made up for by the columns that are still to come.

    Beyond the paper: with the mask found, all kept weights, those of earlier columns too, are fitted again by least
    squares under H (`refit`).

    Args:
        weight: [out_features, in_features], floating point; weights that are zero go first and stay zero.
        inputs: statistics with hessian [blocks, in_features, in_features]; out_features is a multiple of blocks.
        sparsity: share of each block of columns that goes, [0, 1).
        pattern: keep so many of so many neighbours instead, or remove that share of blocks of weights.
        block: columns whose mask is chosen at once.
        damping: share of the mean of diag(H) that is added to it, > 0.
        refits: steps of the last fit, >= 0; 0 is the paper's algorithm.

    Returns:
        The new weight, float32, zero where not kept, and the mask, True = kept.

    Raises:
        ValueError: numbers out of range, or a Hessian of another shape.

    >>> x = torch.randn(64, 8) @ torch.randn(8, 8)
    >>> _, mask = sparsegpt(torch.randn(4, 8), Inputs((x.T @ x / 32)[None], 64), sparsity=0.5)
    >>> int(mask.sum())
    16
    """
    width = 1 if pattern is None else pattern[1]
    if not damping > 0 or refits < 0 or block < 1 or block % width:
        raise ValueError(
            "damping must be above 0, refits at least 0 and block at least 1 and a multiple of the pattern's width, "
            f"got {damping}, {refits} and {block}"
        )
    check_hessian(weight, inputs.hessian)
    hessian = damped(inputs.hessian, damping)
    target = weight.detach().float().reshape(hessian.shape[0], -1, weight.shape[1])
    found, mask = _sweep(target, inverse_root(hessian, None), sparsity, pattern, block)
    found = refit(target, found, mask, hessian, steps=refits)
    return found.view(weight.shape), mask.view(weight.shape)


def _sweep(
    target: Tensor, root: Tensor, sparsity: float, pattern: Pattern | Block | None, block: int
) -> tuple[Tensor, Tensor]:
    """Algorithm 1. Works on columns as rows, so that each is contiguous."""
    work = target.transpose(1, 2).contiguous()
    kept = torch.empty_like(work, dtype=torch.bool)
    zero = target.transpose(1, 2) == 0
    for first in range(0, work.shape[1], block):
        last = min(first + block, work.shape[1])
        cost = (work[:, first:last] / root.diagonal(dim1=1, dim2=2)[:, first:last, None]).square_()
        cost.masked_fill_(zero[:, first:last], 0.0)
        kept[:, first:last] = _keep(cost, sparsity, pattern) & ~zero[:, first:last]
        errors = torch.empty_like(work[:, first:last])
        for column in range(first, last):
            value = work[:, column]
            error = (value * ~kept[:, column]) / root[:, column, column, None]
            errors[:, column - first] = error
            rest = slice(column + 1, last)
            work[:, rest].baddbmm_(root[:, column, rest, None], error[:, None], alpha=-1)
        work[:, last:].baddbmm_(root[:, first:last, last:].transpose(1, 2), errors, alpha=-1)
    return (work * kept).transpose(1, 2).contiguous(), kept.transpose(1, 2).contiguous()


def _keep(cost: Tensor, sparsity: float, pattern: Pattern | Block | None) -> Tensor:
    """Which of a block's weights [blocks, columns, rows] stay."""
    rows = cost.transpose(1, 2)
    if isinstance(pattern, Pattern):
        return mask_of_pattern(rows.flatten(0, 1), pattern).view(rows.shape).transpose(1, 2)
    if pattern is not None:
        small = masks_at_sparsity({"": torch.stack([pooled(matrix, pattern) for matrix in rows])}, sparsity)[""]
        whole = [unpooled(mask, pattern, matrix.shape) for mask, matrix in zip(small, rows, strict=True)]
        return torch.stack(whole).transpose(1, 2)
    return masks_at_sparsity({"": cost}, sparsity)[""]


@torch.no_grad()
def prune_sparsegpt(model: nn.Module, request: Request) -> Outcome:
    """Prune layer after layer behind the pruned ones, every layer to the request's sparsity or pattern."""

    def choose(weight: Tensor, inputs: Inputs, name: str) -> tuple[Tensor, Tensor]:
        return sparsegpt(weight, inputs, sparsity=request.sparsity, pattern=request.pattern)

    return prune_layer_by_layer(model, request, request.batches("method='sparsegpt'"), choose)
