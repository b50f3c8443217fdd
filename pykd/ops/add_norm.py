"""Layer normalisation of a sum: the residual connection of a transformer and what follows it, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, native, num_threads, skips_dispatcher

TABLE.extend(
    [
        Route("add_norm", "cpu", "float32, contiguous, no gradient wanted, not compiled", "native kernel"),
        Route("add_norm", "all", "otherwise", "torch.nn.functional.layer_norm of the sum"),
    ]
)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias with s = x + residual (Ba et al. 2016).

    Args:
        x, residual: [..., features], floating point, of one shape.
        weight, bias: [features].
        eps: above 0.

    Mean and variance (of the population) are over the last dimension. Returns the shape of x. Differentiable. Raises
    ValueError for shapes that do not fit.

    >>> add_norm(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2), torch.zeros(2))
    tensor([[ 1.0000, -1.0000]])
    """
    if x.shape != residual.shape or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (x, residual, weight, bias))
        raise ValueError(f"x and residual must be alike, weight and bias as long as their last dimension; got {shapes}")
    parts = (x, residual, weight, bias)
    if native is None or not x.numel() or not _runs_natively(parts):
        return F.layer_norm(x + residual, weight.shape, weight, bias, eps)
    y = torch.empty_like(x)
    addresses = (part.data_ptr() for part in (*parts, y))
    native.add_norm(*addresses, x.numel() // x.shape[-1], x.shape[-1], eps, num_threads())
    return y


def _runs_natively(parts: tuple[Tensor, ...]) -> bool:
    x, residual, weight, bias = parts
    plain = skips_dispatcher(x, weight) and skips_dispatcher(residual, bias)
    return plain and all(part.dtype == torch.float32 and part.is_cpu and part.is_contiguous() for part in parts)
