"""Distillation by attention maps: the student learns where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """KL divergence of attention distributions, teacher from student (MiniLM, Wang et al. 2020, eq. 4).

    Maps (rows, heads, queries, keys) whose rows add up to 1; where the numbers of heads differ, both are averaged over
    their heads first. masks (rows, queries): queries that count, None for all. Dropout on the student's map is undone
    as far as possible: what was dropped is left out, and the rest adds up to 1 again. Mean over heads, queries, pairs.

    >>> sure, unsure = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.5, 0.5]]]])
    >>> round(attention_loss([unsure], [sure], [None]).item(), 4)
    0.6931
    """
    losses = []
    for mine, its, mask in zip(student, teacher, masks, strict=True):
        s, t = mine.float(), its.float()
        if s.shape[1] != t.shape[1]:
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        s = s / s.sum(-1, keepdim=True).clamp_min(1e-12)
        both = (s > 0) & (t > 0)
        ratio = torch.where(both, t, 1.0).log() - torch.where(both, s, 1.0).log()
        divergence = (t * ratio).sum(-1)
        if mask is None:
            losses.append(divergence.mean())
        else:
            weight = mask.unsqueeze(1).to(divergence.dtype)
            losses.append((divergence * weight).sum() / (weight.sum() * divergence.shape[1]).clamp_min(1))
    return torch.stack(losses).mean()
