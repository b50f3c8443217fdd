"""Distillation by hidden states: the student's layers learn what the teacher's layers hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Mean squared error of hidden states or feature maps (FitNets, Romero et al. 2015, eq. 3; TinyBERT, eq. 8).

    Pairs of equal shape, the student's already projected to the teacher's width: (rows, positions, width) with a mask
    (rows, positions) of the positions that count, or (rows, channels, height, width) with None. Each pair's mean runs
    over everything that counts; the loss is the mean over pairs.

    >>> hidden_loss([torch.zeros(1, 2, 3)], [torch.ones(1, 2, 3)], [torch.tensor([[True, False]])])
    tensor(1.)
    """
    losses = []
    for mine, its, mask in zip(student, teacher, masks, strict=True):
        squares = (mine.float() - its.float()).square()
        if mask is None:
            losses.append(squares.mean())
        else:
            weight = mask.unsqueeze(-1).to(squares.dtype)
            losses.append((squares * weight).sum() / (weight.sum() * squares.shape[-1]).clamp_min(1))
    return torch.stack(losses).mean()
