"""`kd_loss_topk`: distillation from the classes that an offline teacher kept; what it means and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from pykd.ops import kl_div_topk_gpu  # noqa: F401  (registers the CUDA implementations)
from pykd.ops.kd_loss_checks import (
    check_integers,
    check_logits,
    check_shares,
    check_temperature,
    labels_and_scale,
    reduce,
)
from pykd.ops.kl_div_topk import Options
from pykd.ops.row_loss import call

MISSING = ("zero", "tail")


def kd_loss_topk(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    missing: str = "zero",
    stored_temperature: float = 1.0,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
    inplace: bool = False,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale_t2: bool = True,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Distillation from some classes of a teacher, kept as top-k or sampled (Anshumann et al., 2025, arXiv 2503.16870).

    With the kept weights w = exp(teacher_log_probs), added up where an id repeats, P = softmax(student / T) over the
    whole vocabulary, and m = sum w, for every position `alpha * T^2 * D + (1 - alpha) * CE(student, label)`:

    | missing | D | gradient of D by the logits |
    |---|---|---|
    | `"zero"` | sum over kept Q log(Q / P); Q = w, or for T != S: m w^(S/T) / sum w^(S/T) | (m P - Q) / T |
    | `"tail"` | sum over kept w log(w / P) + R log(R / O) | kept (N P - w) / T, others P (N - R / O) / T |

    S is `stored_temperature`, the temperature of the softmax that the weights come from. `"zero"` takes what was not
    kept as 0, and tempers only within what was kept, whose mass it keeps. `"tail"` makes one more class of the rest:
    R = max(0, 1 - m) for the teacher, O = sum of P outside the kept classes for the student, N = m + R. A tail cannot
    be tempered, so it needs T = S. D is a divergence, and not negative, where its weights sum to 1.

    | case | meaning |
    |---|---|
    | top-k, truncated | `"tail"`, or `"zero"`: then the student learns the kept mass only |
    | sampled (unbiased) | `"zero"`; the weights are counts / draws, or importance weights, which need not sum to 1 |
    | id -1 | no entry: rows may hold fewer than k; its weight is not read |
    | no entry at all | D = 0, also with `"tail"`: both sides hold one class of mass 1 |
    | every class kept | no tail is left, R = O = 0: D is `kl_div_loss` of the full distribution |
    | weight 0 (-inf) | the class is kept with target 0 |
    | a student's logit -inf | +inf where the class has Q > 0 (or is all that O holds, with R > 0), finite gradient |
    | a position all -inf | +inf (0 without any weight), gradient 0 |
    | NaN | propagates to value and gradient, unless the position is masked |

    `ignore_index`, `label_smoothing`, `shift`, `inplace`, `reduction`, `mask`, `weights`, `scale_t2` and `num_items`
    are those of `kd_loss`; alpha = 1 needs no labels. With `shift` only labels, mask and weights move: the teacher's
    entries stand where its logits stood.

    Shapes: student_logits (..., classes); teacher_ids, any integers, and teacher_log_probs, both (..., k); labels,
    mask, weights (...). Types: float32, bfloat16, float16 in any mixture; arithmetic and the result are float32
    (float64 for float64 input, by the reference). Memory: one gradient of the logits, or none with `inplace`, and a
    few rows a thread. The teacher is a constant. The gradient is computed with the loss and has no second derivative.

    Raises ValueError or TypeError for options, shapes or types that do not fit and for labels or ids out of range; on
    CUDA the last two are device-side assertions, because the host never waits for the device.

    >>> import torch, pykd
    >>> teacher = torch.tensor([[2.0, 0.0, -1.0, -3.0]]).log_softmax(-1)
    >>> kept = teacher.topk(2)
    >>> student = torch.zeros(1, 4, requires_grad=True)
    >>> loss = pykd.kd_loss_topk(student, kept.indices, kept.values, missing="tail")
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
    (0.8145, [-0.589, 0.1365, 0.2263, 0.2263])
    """
    check_shares(alpha, label_smoothing)
    rows = _check_teacher(student_logits, teacher_ids, teacher_log_probs)
    check_temperature("temperature", temperature)
    check_temperature("stored_temperature", stored_temperature)
    if missing not in MISSING:
        raise ValueError(f"missing must be one of {', '.join(MISSING)}, got {missing!r}")
    if missing == "tail" and temperature != stored_temperature:
        raise ValueError(
            f"missing='tail' needs temperature == stored_temperature, got {temperature} and {stored_temperature}: what "
            "was not kept cannot be tempered; use the stored temperature, or missing='zero'"
        )
    flat, scale = labels_and_scale(
        student_logits,
        labels,
        alpha=alpha,
        ignore_index=ignore_index,
        shift=shift,
        mask=mask,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
    )
    t2 = temperature * temperature if scale_t2 else 1.0
    power = stored_temperature / temperature
    options = Options(temperature, power, missing == "tail", alpha * t2, 1.0 - alpha, label_smoothing)
    kept = teacher_ids.shape[-1]
    teacher = {
        "teacher_ids": teacher_ids.reshape(rows.numel(), kept).to(torch.int64),
        "teacher_log_probs": teacher_log_probs.detach().reshape(rows.numel(), kept),
    }
    return reduce(call("kl_div_topk", student_logits, teacher, flat, scale, options, inplace), reduction, rows)


def _check_teacher(student: Tensor, ids: Tensor, log_probs: Tensor) -> torch.Size:
    """The leading shape of the logits, which the teacher's entries must share."""
    check_logits("student_logits", student)
    check_integers("teacher_ids", ids)
    rows = student.shape[:-1]
    if not log_probs.is_floating_point():
        raise TypeError(f"teacher_log_probs must be floating point, got {log_probs.dtype}: pass natural logarithms")
    if ids.dim() == 0 or ids.shape != log_probs.shape or ids.shape[:-1] != rows:
        raise ValueError(
            f"teacher_ids and teacher_log_probs must both have shape {(*rows, 'k')} for student_logits "
            f"{tuple(student.shape)}, got {tuple(ids.shape)} and {tuple(log_probs.shape)}"
        )
    for name, tensor in (("teacher_ids", ids), ("teacher_log_probs", log_probs)):
        if tensor.device != student.device:
            raise ValueError(f"{name} are on {tensor.device} and student_logits on {student.device}: move one")
    return rows
