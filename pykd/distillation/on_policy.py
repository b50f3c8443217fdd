"""Distillation on the student's own words: the teacher corrects what the student would really write."""

from __future__ import annotations

from torch import Tensor

from pykd.ops.kd_loss import kl_div_loss
from pykd.training.labels import IGNORED


def on_policy_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    shift: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence over the positions written (GKD, Agarwal et al. 2024, eq. 1 and 4).

    Logits (rows, positions, classes) of both models for one and the same sequences; labels (rows, positions), -100
    where a position was not written. beta in 0..1: 0 is the forward, 1 the reverse divergence. shift: position i
    belongs to label i + 1. Mean over the positions that count.

    >>> import torch
    >>> on_policy_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[0, -100]])).item()
    0.0
    """
    if shift:
        student_logits, teacher_logits, labels = student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
    return kl_div_loss(
        student_logits, teacher_logits, direction="jsd", beta=beta, temperature=temperature, mask=labels != IGNORED
    )
