"""`kl_div_loss` and `kd_loss`: what the distillation losses mean, their checks and their reductions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pykd.ops import kl_div_gpu  # noqa: F401  (registers the CUDA implementations)
from pykd.ops.kl_div import DIRECTION_CODES, Options

REDUCTIONS = ("batchmean", "sum", "none")


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
    | every position masked | 0, and zero gradients |
    | a logit -inf | probability 0; a class that both sides lack contributes 0 |
    | -inf in the student only | `forward` is +inf, with its finite gradient; the others stay finite |
    | -inf in the teacher only | `reverse` is +inf and that position's gradient 0; the others stay finite |
    | a position all -inf | +inf (0 if on both sides), gradient 0 |
    | narrower vocabulary | its missing entries are -inf |
    | NaN | propagates to value and gradient, unless the position is masked |

    Shapes: logits (..., classes), where the last dimensions may differ; mask (bool, True counts) and weights (...).
    Types: float32, bfloat16, float16, in any mixture; arithmetic and the result are float32 (float64 for float64
    input, by the reference). T in (0, inf), tested from 0.05 to 20. The teacher is a constant: it gets no gradient.
    The gradient is computed with the loss, if the student requires one, and has no second derivative.

    Raises ValueError or TypeError for options, shapes or types that do not fit.

    >>> import torch, pykd
    >>> teacher = torch.tensor([[2.0, 0.0, -1.0]])
    >>> student = torch.zeros(1, 3, requires_grad=True)
    >>> loss = pykd.kl_div_loss(student, teacher, temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(x, 4) for x in student.grad[0].tolist()]
    (0.7405, [-0.5817, 0.1244, 0.4573])
    """
    options, rows = _options(student_logits, teacher_logits, temperature, direction, beta, 1.0, 0.0, scale_t2)
    _check_reduction(reduction, num_items)
    scale = _scale(student_logits, None, mask, weights, reduction, num_items)
    return _reduce(_call(student_logits, teacher_logits, None, scale, options, False), reduction, rows)


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
    part of another tensor, and logits that share memory with the teacher's. Tensors that autograd saved for earlier
    operations are protected by torch's version counter.

    Raises ValueError or TypeError for options, shapes or types that do not fit and for labels out of range; on CUDA a
    label out of range is a device-side assertion, because the host never waits for the device.

    >>> import torch, pykd
    >>> student = torch.zeros(2, 3, requires_grad=True)
    >>> teacher = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    >>> round(pykd.kd_loss(student, teacher, torch.tensor([0, 1])).item(), 4)
    1.2767
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}: it is the share of the distillation term")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    options, rows = _options(
        student_logits, teacher_logits, temperature, direction, beta, alpha, label_smoothing, scale_t2
    )
    _check_reduction(reduction, num_items)
    if labels is None:
        if alpha != 1:
            raise ValueError(f"labels are needed for the label term: pass labels, or alpha=1 (got alpha={alpha})")
    else:
        _check_labels(labels, rows, student_logits.device)
    if shift:
        labels, mask, weights = _shifted(rows, labels, ignore_index, mask, weights, student_logits.device)
    valid = None if labels is None else labels.reshape(-1) != ignore_index
    scale = _scale(student_logits, valid, mask, weights, reduction, num_items)
    flat = None if labels is None else labels.reshape(-1).long()
    return _reduce(_call(student_logits, teacher_logits, flat, scale, options, inplace), reduction, rows)


def _options(
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
        if not logits.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {logits.dtype}: pass logits, not class indices")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} needs a last dimension of at least one class, got shape {tuple(logits.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must agree in every "
            "dimension but the last (classes)"
        )
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device} and teacher_logits on {teacher.device}: move one")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
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


def _check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is None:
        return
    if reduction != "batchmean":
        raise ValueError(f"num_items is the divisor of reduction='batchmean', got reduction={reduction!r}: drop it")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}")
    elif not num_items > 0:
        raise ValueError(f"num_items must be positive, got {num_items}: it counts the positions of the whole batch")


def _check_labels(labels: Tensor, rows: torch.Size, device: torch.device) -> None:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: pass class indices, not probabilities")
    _check_positions("labels", labels, rows, device)


def _check_positions(name: str, tensor: Tensor, rows: torch.Size, device: torch.device) -> None:
    if tensor.shape != rows:
        raise ValueError(f"{name} must have one entry per position, shape {tuple(rows)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} are on {tensor.device} and student_logits on {device}: move one")


def _scale(
    student: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """What each position's loss is multiplied by, (rows,): weight / divisor, and 0 where it does not count."""
    rows, device = student.shape[:-1], student.device
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True counts), got {mask.dtype}: use mask.bool(), or weights=")
        _check_positions("mask", mask, rows, device)
        valid = mask.reshape(-1) if valid is None else valid & mask.reshape(-1)
    divisor: Any = num_items
    if reduction == "batchmean" and divisor is None:
        divisor = max(rows.numel(), 1) if valid is None else valid.sum().clamp(min=1)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(device=device, dtype=dtype, non_blocking=True).reshape(())
    if weights is None:
        scale = torch.ones(rows.numel(), dtype=dtype, device=device)
    else:
        _check_positions("weights", weights, rows, device)
        scale = weights.detach().reshape(-1).to(dtype)
    if divisor is not None:
        scale = scale / divisor
    return scale if valid is None else torch.where(valid, scale, 0.0)


def _shifted(
    rows: torch.Size,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weights: Tensor | None,
    device: torch.device,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Labels, mask and weights moved one position to the left, with the last position masked."""
    if not rows:
        raise ValueError("shift=True needs logits of shape (..., time, classes), got a single position")
    last = torch.zeros(rows, dtype=torch.bool, device=device)
    last[..., -1:] = True
    if mask is None:
        mask = ~last
    else:
        _check_positions("mask", mask, rows, device)
        mask = mask.roll(-1, -1) & ~last
    labels = None if labels is None else labels.roll(-1, -1)
    return labels, mask, None if weights is None else weights.roll(-1, -1)


def _call(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: Options, inplace: bool
) -> Tensor:
    need_grad = student.requires_grad and torch.is_grad_enabled()
    teacher = teacher.detach().reshape(-1, teacher.shape[-1])
    if inplace and need_grad and not torch.compiler.is_compiling():
        _check_inplace(student, teacher)
        losses: Tensor = _InPlace.apply(student, teacher, labels, scale, options)  # type: ignore[no-untyped-call]
        return losses
    flat = student.reshape(-1, student.shape[-1])
    return torch.ops.pykd.kl_div(flat, teacher, labels, scale, need_grad, *options)[0]  # type: ignore[no-any-return]


def _reduce(losses: Tensor, reduction: str, rows: torch.Size) -> Tensor:
    return losses.reshape(rows) if reduction == "none" else losses.sum()


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    base = student._base
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError("inplace=True would overwrite a leaf tensor that requires a gradient: use inplace=False")
    if not student.is_contiguous():
        raise ValueError(f"inplace=True needs contiguous student_logits, got strides {student.stride()}")
    if base is not None and base.numel() != student.numel():
        raise ValueError("inplace=True would overwrite part of a larger tensor that student_logits is a view of")
    if student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError("inplace=True would overwrite teacher_logits, which share memory with student_logits")


class _InPlace(torch.autograd.Function):
    """`kl_div_` under autograd: the student's memory holds its gradient until backward hands it on."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: Options
    ) -> Tensor:
        gradient = student.detach().view(-1, student.shape[-1])
        losses: Tensor = torch.ops.pykd.kl_div_(gradient, teacher, labels, scale, *options)
        torch.autograd.graph.increment_version(gradient)  # tensors saved by earlier operations are now invalid
        ctx.save_for_backward(gradient)
        ctx.shape, ctx.used = student.shape, False
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if ctx.used or torch.is_grad_enabled():
            raise RuntimeError(
                "kd_loss(inplace=True) keeps one gradient for one backward: a second backward, or create_graph=True, "
                "needs inplace=False"
            )
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        (upstream,) = grads
        if upstream.device.type != "cpu" or not bool((upstream == 1).all()):
            gradient.mul_(upstream.unsqueeze(1))
        return gradient.view(ctx.shape), None, None, None, None
