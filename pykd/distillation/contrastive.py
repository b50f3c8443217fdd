"""Distillation by contrast: each row of the student is to be told apart by its own row of the teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(student: Tensor, teacher: Tensor, *, sharpness: float = 0.1) -> Tensor:
    """InfoNCE between the rows of both models (CRD, Tian et al. 2020, with the batch in the memory's place).

    -log(exp(cos(s_i, t_i) / sharpness) / sum_j exp(cos(s_i, t_j) / sharpness)), mean over rows i; log(rows) where the
    student tells nothing. student, teacher (rows, width), the student's already projected; sharpness > 0.

    >>> rows = torch.eye(4)
    >>> contrastive_loss(rows, rows).item() < 0.001
    True
    """
    s, t = F.normalize(student.float(), dim=1), F.normalize(teacher.float(), dim=1)
    return F.cross_entropy(s @ t.T / sharpness, torch.arange(len(s), device=s.device))
