"""Distillation from kept classes in plain torch: the specification of the op `kl_div_topk`, its fallback and oracle.

The kept weights are spread over the whole vocabulary first, so that no rule for lists (padding, repeated ids) is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pykd.ops.kl_div_reference import expected, log_probabilities, log_ratio, mixed

_INF = float("inf")


def spread(ids: Tensor, log_probs: Tensor, classes: int, power: float) -> tuple[Tensor, Tensor]:
    """Target (rows, classes) and which classes were kept: weights of one id add up, -1 is no entry."""
    rows, used = ids.shape[0], (ids >= 0) & (ids < classes)
    index = torch.where(used, ids, classes)
    weights = torch.where(used, log_probs.exp(), 0.0)
    target = weights.new_zeros(rows, classes + 1).scatter_add(1, index, weights)[:, :-1]
    kept = torch.zeros(rows, classes + 1, dtype=torch.bool, device=ids.device).scatter(1, index, True)[:, :-1]
    return temper(target, power), kept


def temper(weights: Tensor, power: float) -> Tensor:
    """weights^power, with the sum of the weights."""
    if power == 1:
        return weights
    return weights.sum(-1, keepdim=True) * log_probabilities(power * weights.log()).exp()


def _divergence(student: Tensor, target: Tensor, kept: Tensor, temperature: float, tail: bool) -> tuple[Tensor, Tensor]:
    """sum Q log(Q / P) + R log(R / O), and its gradient: O is P outside the kept classes, R the mass missing there."""
    log_p = log_probabilities(student / temperature)
    p, mass, log_others = log_p.exp(), target.sum(-1), log_p.masked_fill(kept, -_INF).logsumexp(-1)
    value = expected(target, log_ratio(target.log(), log_p)).sum(-1)
    if tail:
        rest = torch.where(kept.all(-1), 0.0, (1 - mass).clamp(min=0))
        value = value + expected(rest, log_ratio(rest.log(), log_others))
        share = torch.where(log_p == -_INF, 0.0, (log_p - log_others.unsqueeze(-1)).exp())
        mass, target = mass + rest, torch.where(kept, target, rest.unsqueeze(-1) * share)
    nothing = (log_p == -_INF).all(-1)
    value = torch.where(nothing & (mass != 0), mass * _INF, torch.where(p.isnan().any(-1), p.sum(-1), value))
    slope = torch.where(nothing.unsqueeze(-1), 0.0, p * mass.unsqueeze(-1) - target)
    return value, slope / temperature


def kl_div_topk_reference(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    temperature: float,
    power: float,
    tail: bool,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Row losses `scale * (kl_weight * divergence + ce_weight * cross entropy)` and their gradient by the student.

    Shapes: student (rows, classes), ids and log_probs (rows, kept), labels and scale (rows,). Computes in float32, or
    in float64 if an input has it. The gradient has the student's type; a row of scale 0 is skipped whatever it holds.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, log_probs.dtype), torch.float32)
    divergence = None
    if kl_weight != 0:
        target, kept = spread(ids, log_probs.to(dtype), student.shape[1], power)
        divergence = _divergence(student.to(dtype), target, kept, temperature, tail)
    return mixed(student, divergence, labels, scale, kl_weight, ce_weight, label_smoothing, dtype)
