"""`kl_div_loss` and `kd_loss`: what the distillation losses mean, and their checks."""

from __future__ import annotations

import torch
from torch import Tensor

from pykd.ops import kl_div_gpu  # noqa: F401  (registers the CUDA implementations)
from pykd.ops.kd_loss_checks import (
    check_logits,
    check_reduction,
    check_shares,
    check_temperature,
    labels_and_scale,
    reduce,
    row_scale,
)
from pykd.ops.kl_div import DIRECTION_CODES, Options
from pykd.ops.row_loss import call


def kl_div_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float | None = None,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale_t2: bool = True,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Divergence of the student's from the teacher's softened distribution (Hinton et al., 2015, section 2).

    With P = softmax(student / T), Q = softmax(teacher / T) over the last dimension, for every position:

    | direction | sum over the classes of | gradient by the student's logits |
    |---|---|---|
    | `forward` | Q log(Q / P) | (P - Q) / T |
    | `reverse` | P log(P / Q) | P (log(P / Q) - reverse) / T |
    | `jsd` | beta Q log(Q / M) + (1 - beta) P log(P / M), M = beta Q + (1 - beta) P (Agarwal et al., 2024, eq. 1) | |
    | `tv` | abs(P - Q) / 2 | |

    times T^2 if `scale_t2`, times the position's weight. `beta` in [0, 1], 0.5 unless given; by definition 0 is
    forward and 1 reverse, because the mixture itself vanishes there.

    | case | meaning |
    |---|---|
    | `reduction="batchmean"` | sum over classes, mean over every position that is not masked (never over classes) |
    | `"sum"`, `"none"` | sum over positions; one value a position, 0 where masked |
    | `num_items` | divisor of `batchmean` instead of the count here: micro-batches then add up to the whole batch |
    | | (k micro-batches or processes; DDP averages, so divide the whole batch's count by the processes there) |
    | every position masked | 0, and zero gradients |
    | a logit -inf | probability 0; a class that both sides lack contributes 0 |
    | -inf in the student only | `forward` is +inf, with its finite gradient; the others stay finite |
    | -inf in the teacher only | `reverse` is +inf and that position's gradient 0; the others stay finite |
    | a position all -inf | +inf (0 if on both sides), gradient 0 |
    | narrower vocabulary | its missing entries are -inf; cut a teacher that is only padded wider: `[..., :classes]` |
    | NaN | propagates to value and gradient, unless the position is masked |

    Shapes: logits (..., classes), where the last dimensions may differ; mask (bool, True counts) and weights (...).
    Types: float32, bfloat16, float16, in any mixture; arithmetic and the result are float32 (float64 for float64
    input, by the reference). T in (0, inf), tested from 0.05 to 20. The teacher and the weights are constants: they get
    no gradient. The gradient is computed with the loss, if the student requires one, and has no second derivative.

    Raises ValueError or TypeError for options, shapes or types that do not fit.

    >>> import torch, pykd
    >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
    >>> student = torch.zeros(1, 3, requires_grad=True)
    >>> loss = pykd.kl_div_loss(student, teacher, temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
    (0.7706, [-0.5904, 0.2042, 0.3862])
    """
    options, rows = loss_options(student_logits, teacher_logits, temperature, direction, beta, 1.0, 0.0, scale_t2)
    check_reduction(reduction, num_items)
    scale = row_scale(student_logits, None, mask, weights, reduction, num_items)
    return reduce(_call(student_logits, teacher_logits, None, scale, options, False), reduction, rows)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
    inplace: bool = False,
    direction: str = "forward",
    beta: float | None = None,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale_t2: bool = True,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Knowledge distillation loss (Hinton et al., 2015): alpha * divergence + (1 - alpha) * cross entropy, in one pass.

    For every position: `alpha * T^2 * D(teacher / T, student / T) + (1 - alpha) * CE(student, label)`, with D as in
    `kl_div_loss`, which also explains `direction`, `beta`, `reduction`, `mask`, `weights`, `scale_t2`, `num_items`
    and the rules for -inf, NaN, types and vocabularies of different width.

    | option | meaning |
    |---|---|
    | `alpha` in [0, 1] | share of the divergence; 1 needs no labels (None) |
    | `ignore_index` | positions with this label count nowhere: not in D, not in CE, not in the mean |
    | `label_smoothing` in [0, 1] | CE against (1 - s) one-hot + s / student classes, as torch's cross_entropy |
    | `shift` | causal: position i is scored against label, mask and weight i + 1 of dimension -1; the last is ignored |
    | `inplace` | the gradient may overwrite the student's logits: no second buffer; they are garbage afterwards |

    Shapes: logits (..., classes); labels (...), integers in [0, student classes) or `ignore_index`.
    `inplace` acts only when a gradient is wanted, and backward can then run once; compiled graphs manage their memory
    themselves and ignore it. It is refused where it would be unsafe: leaf tensors, non-contiguous ones, views of a
    part of another tensor, and logits that share memory with the teacher's (by torch, what `split` and `unbind`
    return). To autograd the logits have changed: backward is an error if an earlier operation had saved them, or if
    they were changed, or used in another term of the loss, afterwards. Differentiate by what they were made of, not by
    them.

    Raises ValueError or TypeError for options, shapes or types that do not fit and for labels out of range; on CUDA a
    label out of range is a device-side assertion, because the host never waits for the device.

    >>> import torch, pykd
    >>> student = torch.zeros(2, 3, requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    >>> round(pykd.kd_loss(student, teacher, torch.tensor([0, 1])).item(), 4)
    1.0278
    """
    check_shares(alpha, label_smoothing)
    options, rows = loss_options(
        student_logits, teacher_logits, temperature, direction, beta, alpha, label_smoothing, scale_t2
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
    return reduce(_call(student_logits, teacher_logits, flat, scale, options, inplace), reduction, rows)


def loss_options(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    direction: str,
    beta: float | None,
    alpha: float,
    label_smoothing: float,
    scale_t2: bool,
) -> tuple[Options, torch.Size]:
    """The op's options, and the leading shape of the logits, checked."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_logits(name, logits)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must agree in every "
            "dimension but the last (classes)"
        )
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device} and teacher_logits on {teacher.device}: move one")
    check_temperature("temperature", temperature)
    if direction not in DIRECTION_CODES:
        raise ValueError(f"direction must be one of {', '.join(DIRECTION_CODES)}, got {direction!r}")
    if beta is not None and direction != "jsd":
        raise ValueError(f"beta belongs to direction='jsd', got direction={direction!r}: drop beta")
    beta = 0.5 if beta is None else beta
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}: it is the teacher's share of the mixture")
    if direction == "jsd" and beta in (0, 1):
        direction = "reverse" if beta else "forward"
    t2 = temperature * temperature if scale_t2 else 1.0
    return Options(temperature, direction, beta, alpha * t2, 1.0 - alpha, label_smoothing), student.shape[:-1]


def _call(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: Options, inplace: bool
) -> Tensor:
    constants = {"teacher_logits": teacher.detach().reshape(-1, teacher.shape[-1])}
    return call("kl_div", student, constants, labels, scale, options, inplace)
