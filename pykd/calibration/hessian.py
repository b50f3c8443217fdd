"""The second moments of a layer's inputs, made fit for column after column of error feedback."""

from __future__ import annotations

import torch
from torch import Tensor


def check_hessian(weight: Tensor, hessian: Tensor) -> None:
    """Raise ValueError unless hessian is [blocks, columns, columns] of a weight whose rows the blocks divide."""
    rows, columns = weight.shape
    if hessian.dim() != 3 or hessian.shape[1:] != (columns, columns) or rows % hessian.shape[0]:
        raise ValueError(
            f"a hessian [blocks, {columns}, {columns}] whose blocks divide {rows} outputs fits this weight, got "
            f"{list(hessian.shape)}"
        )


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I; the identity where all inputs were zero."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
    mean = torch.where(mean > 0, mean, 1.0)
    return hessian + damping * mean[:, None, None] * torch.eye(hessian.shape[1], device=hessian.device)


def inverse_root(hessian: Tensor, order: Tensor | None) -> Tensor:
    """Upper U with H^-1 = U^T U, float32, for H in this order of columns.

    It is the inverse of the upper R with H = R R^T, which is a Cholesky factor turned around: H is never inverted.
    """
    if order is not None:
        hessian = rows_of(rows_of(hessian, order).transpose(1, 2), order)
    root = torch.linalg.cholesky(hessian.double().flip(1, 2)).flip(1, 2)
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=True)
    return inverse.float()


def rows_of(matrix: Tensor, order: Tensor) -> Tensor:
    """The rows [blocks, columns, ...] of a batch of matrices in the order [blocks, columns]."""
    return matrix.gather(1, order[:, :, None].expand(-1, -1, matrix.shape[2]))
