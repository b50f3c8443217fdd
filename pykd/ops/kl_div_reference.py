"""The distillation losses in plain torch: the specification of the op `kl_div`, its fallback, oracle and baseline.

One function per direction returns the divergence of each row and its gradient by `student / temperature`, from the
probabilities p (student) and q (teacher) and their logarithms. -inf is handled where it would meet 0 or another -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, pad

_Pair = tuple[Tensor, Tensor]
_INF = float("inf")


def expected(p: Tensor, x: Tensor) -> Tensor:
    """p * x, and 0 where p is exactly 0 for a class that is not there (x may be infinite)."""
    return torch.where((p == 0) & (x != _INF), 0.0, torch.where(x == _INF, x, p * x))


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """a - b for logarithms: -inf against -inf is 0."""
    return torch.where(a == b, 0.0, a - b)


def _softmax_slope(p: Tensor, g: Tensor) -> Tensor:
    """Derivative by the logits of f(p) with df/dp = g: p * (g - sum(p * g)), where p = 0 has no slope."""
    product = torch.where(p == 0, 0.0, p * g)
    return product - p * product.sum(-1, keepdim=True)


def _forward(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, beta: float) -> _Pair:
    return expected(q, log_ratio(log_q, log_p)).sum(-1), p - q


def _reverse(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, beta: float) -> _Pair:
    ratio = log_ratio(log_p, log_q)
    kl = expected(p, ratio).sum(-1)
    return kl, torch.where((kl == _INF).unsqueeze(-1), 0.0, _softmax_slope(p, ratio))


def _jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, beta: float) -> _Pair:
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))  # where p and q underflow, too
    of_student, of_teacher = log_ratio(log_p, log_m), log_ratio(log_q, log_m)
    loss = beta * expected(q, of_teacher).sum(-1) + (1 - beta) * expected(p, of_student).sum(-1)
    return loss, (1 - beta) * _softmax_slope(p, of_student)


def _tv(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, beta: float) -> _Pair:
    sign = torch.where(p == q, 0.0, (p - q) / (p - q).abs())  # Tensor.sign() of NaN would be 0
    return (p - q).abs().sum(-1) / 2, _softmax_slope(p, sign / 2)


#: Direction -> row divergence and its gradient; the order is that of `Direction` in csrc/ops.h.
DIRECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], _Pair]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jsd": _jsd,
    "tv": _tv,
}


def log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax, and -inf (no distribution) instead of NaN for a row that is -inf throughout."""
    return torch.where((logits == -_INF).all(-1, keepdim=True), -_INF, log_softmax(logits, -1))


def _divergence(student: Tensor, teacher: Tensor, temperature: float, direction: str, beta: float) -> _Pair:
    classes = max(student.shape[1], teacher.shape[1])
    log_p, log_q = (
        log_probabilities(pad(logits, (0, classes - logits.shape[1]), value=-_INF) / temperature)
        for logits in (student, teacher)
    )
    value, slope = DIRECTIONS[direction](log_p.exp(), log_q.exp(), log_p, log_q, beta)
    nothing = [(x == -_INF).all(-1) for x in (log_p, log_q)]
    value = torch.where(nothing[0] & nothing[1], 0.0, torch.where(nothing[0] | nothing[1], _INF, value))
    slope = torch.where((nothing[0] | nothing[1]).unsqueeze(-1), 0.0, slope)
    return value, slope[:, : student.shape[1]] / temperature


def _cross_entropy(student: Tensor, labels: Tensor, used: Tensor, smoothing: float) -> _Pair:
    log_p = log_probabilities(student)
    labels = torch.where(used, labels, 0)
    value = -(1 - smoothing) * log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    target = (1 - smoothing) * one_hot(labels, student.shape[1]).to(student.dtype)
    if smoothing:
        value, target = value - smoothing * log_p.mean(-1), target + smoothing / student.shape[1]
    nothing = (log_p == -_INF).all(-1, keepdim=True)
    return value, torch.where(nothing, 0.0, log_p.exp() - target)


def kl_div_reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor,
    temperature: float,
    direction: str,
    beta: float,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
) -> _Pair:
    """Row losses `scale * (kl_weight * divergence + ce_weight * cross entropy)` and their gradient by the student.

    Shapes: student (rows, classes), teacher (rows, any), labels and scale (rows,). Computes in float32, or in float64
    if an input has it. The gradient has the student's type; a row of scale 0 is skipped whatever it holds.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    divergence = None
    if kl_weight != 0:
        divergence = _divergence(student.to(dtype), teacher.to(dtype), temperature, direction, beta)
    return mixed(student, divergence, labels, scale, kl_weight, ce_weight, label_smoothing, dtype)


def mixed(
    student: Tensor,
    divergence: _Pair | None,
    labels: Tensor | None,
    scale: Tensor,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
    dtype: torch.dtype,
) -> _Pair:
    """A divergence with its gradient (None counts 0) and the cross entropy, weighted, scaled, in the student's type."""
    loss, gradient = torch.zeros_like(scale, dtype=dtype), torch.zeros_like(student, dtype=dtype)
    if divergence is not None:
        loss, gradient = loss + kl_weight * divergence[0], gradient + kl_weight * divergence[1]
    if labels is not None and ce_weight != 0:
        value, slope = _cross_entropy(student.to(dtype), labels, scale != 0, label_smoothing)
        loss, gradient = loss + ce_weight * value, gradient + ce_weight * slope
    skipped = scale == 0
    loss = torch.where(skipped, 0.0, scale * loss).to(scale.dtype)
    gradient = torch.where(skipped.unsqueeze(1), 0.0, scale.unsqueeze(1) * gradient)
    return loss, gradient.to(student.dtype).contiguous()
