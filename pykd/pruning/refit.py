"""The best values of the weights that stay, by the second moments of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(target: Tensor, weight: Tensor, mask: Tensor, hessian: Tensor, *, steps: int) -> Tensor:
    """Least squares of the kept weights, by conjugate gradients from ``weight`` on (Hestenes and Stiefel 1952).

    Minimises ``e H e^T`` row by row with e = target - weight, weight zero where not kept. Each step costs one product
    with H for all rows together, where solving exactly would factorise a matrix per row; the diagonal of H scales the
    steps. The error never grows from one step to the next.

    Args:
        target: [blocks, rows, columns], what the rows were before, float32.
        weight: the same shape, where to begin.
        mask: the same shape, True = kept.
        hessian: [blocks, columns, columns], positive definite.
        steps: at most so many.

    >>> target, mask = torch.ones(1, 1, 2), torch.tensor([[[True, False]]])
    >>> refit(target, target * mask, mask, torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), steps=1)
    tensor([[[1.5000, 0.0000]]])
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)[:, None]
    weight = weight * mask
    residual = ((target - weight) @ hessian) * mask
    scaled = residual / diagonal
    direction, size = scaled.clone(), (residual * scaled).sum(2, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(steps):
        image = (direction @ hessian) * mask
        length = size / (direction * image).sum(2, keepdim=True).clamp_min(tiny)
        weight += length * direction
        residual -= length * image
        torch.div(residual, diagonal, out=scaled)
        new = (residual * scaled).sum(2, keepdim=True)
        direction.mul_(new / size.clamp_min(tiny)).add_(scaled)
        size = new
    return weight
