"""Distillation by logits: the student learns the teacher's whole distribution over the classes."""

from __future__ import annotations

from torch import Tensor

from pykd.nn import KDLoss


def logits_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    shift: bool = False,
) -> Tensor:
    """Distillation loss of one batch (Hinton et al. 2015): alpha * T^2 * KL + (1 - alpha) * cross entropy.

    Logits (..., classes), labels (...) with -100 where a position does not count; mean over the others. T > 0; alpha in
    0..1 weighs the teacher, 1 - alpha the labels. shift: position i belongs to label i + 1.

    >>> import torch
    >>> logits_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), alpha=0.5).item() < 0.35
    True
    """
    loss: Tensor = KDLoss(temperature=temperature, alpha=alpha, shift=shift)(student_logits, teacher_logits, labels)
    return loss
