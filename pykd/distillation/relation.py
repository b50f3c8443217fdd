"""Distillation by relations: the student's rows lie to each other as the teacher's do, whatever their widths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relation_loss(student: Tensor, teacher: Tensor, *, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Distances and angles between the rows of a batch (RKD, Park et al. 2019, eq. 6 and 8), by smooth L1.

    student (rows, width), teacher (rows, any width). Distances are divided by their mean over the batch; angles are
    cosines at the middle row of all triples, which takes rows^3 numbers. distance, angle: weights of the two terms, by
    default in the paper's ratio. 0 for fewer than two rows.

    >>> rows = torch.randn(4, 8)
    >>> relation_loss(rows, 3 * rows).item() < 1e-6  # scale does not matter
    True
    """
    s, t = student.float(), teacher.float()
    if len(s) < 2:
        return s.sum() * 0
    total = distance * F.smooth_l1_loss(_distances(s), _distances(t))
    return total + angle * F.smooth_l1_loss(_angles(s), _angles(t))


def _distances(x: Tensor) -> Tensor:
    """Distances of all pairs over their mean; (pairs,)."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    found = (x[first] - x[second]).square().sum(1).clamp_min(1e-12).sqrt()
    return found / found.mean()


def _angles(x: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, for all i, j, k; (rows, rows, rows)."""
    unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)  # [j, i]: from j to i
    return torch.einsum("jid,jkd->jik", unit, unit)
