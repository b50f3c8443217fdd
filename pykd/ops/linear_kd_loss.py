"""`linear_kd_loss`: the distillation loss from hidden states and output heads, without the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pykd.ops import linear_kd  # noqa: F401  (registers the op)
from pykd.ops.kd_loss import loss_options
from pykd.ops.kd_loss_checks import check_shares, labels_and_scale
from pykd.ops.linear_kd_head import Head

#: Bytes of logits, both sides together, that exist at once. Each chunk reads both weights and reads and writes the
#: weight's gradient, so its GEMMs need some hundred positions to be bound by arithmetic and not by memory: with 151936
#: classes in float32 this holds 160. For 2048 such positions the unfused loss has 2.5 GB of logits, of which the
#: weight's gradient (hidden 1024) later takes the place of 0.6 GB; an eighth of the other 1.9 GB is 233 MB, and the
#: buffers' 195 MB leave room for what the GEMM library packs.
CHUNK_BYTES = 192 * 2**20


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    temperature: float = 4.0,
    alpha: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
    direction: str = "forward",
    beta: float | None = None,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale_t2: bool = True,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """`kd_loss` of two linear heads (Hinton et al., 2015), whose logits exist only for a few positions at a time.

    Equal to `kd_loss(cap(student_hidden @ student_weight.T + student_bias), the same of the teacher, labels, ...)` with
    cap(x) = softcap * tanh(x / softcap), in value and in the gradients by student_hidden, student_weight, student_bias.
    The teacher's tensors are constants. `temperature` to `num_items` are explained at `kd_loss` and `kl_div_loss`.

    | option | meaning |
    |---|---|
    | `softcap`, `teacher_softcap` | bound of the logits' size, positive; None: none |
    | `chunk_bytes` | logits of both sides that exist at once, at least one position's; the student's twice if capped |
    | `alpha` | 0.5 if labels are given, else 1 |
    | `reduction="none"` | nothing is kept for backward but the inputs: it computes the logits once more |

    Shapes: student_hidden (..., features), student_weight (classes, features), student_bias (classes,); the teacher's
    features and classes may differ; labels, mask, weights (...). A head has one floating-point type throughout (any
    under autocast, which then chooses it); logits have that type. The gradients by weight and bias add up in float32
    and are rounded once.

    Memory above inputs and gradients: `chunk_bytes`, and for weights narrower than float32 a sum of 4 bytes for each.
    Backward writes into its own buffers, so retain_graph=True costs a copy unless the upstream gradient is 1.
    Positions that do not count are left out on the CPU; a GPU computes them, because the host would have to wait for
    their number. What their hidden states hold, NaN included, never matters. There is no second derivative.

    Raises ValueError or TypeError for options, shapes or types that do not fit and for labels out of range; on CUDA a
    label out of range is a device-side assertion.

    >>> import torch, pykd
    >>> hidden, weight = torch.tensor([[1.0, -1.0]]), torch.eye(3, 2).requires_grad_()
    >>> teacher_hidden, teacher_weight = torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0], [-0.5]])
    >>> loss = pykd.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, torch.tensor([0]))
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(x, 4) for x in weight.grad[:, 0].tolist()]
    (0.3949, [-0.291, -0.0299, 0.3209])
    """
    given = alpha if alpha is not None else (1.0 if labels is None else 0.5)
    check_shares(given, label_smoothing)
    dtype = _autocast(student_hidden)
    student = _head("student", student_hidden, student_weight, student_bias, "softcap", softcap, dtype)
    teacher = _head("teacher", teacher_hidden, teacher_weight, teacher_bias, "teacher_softcap", teacher_softcap, dtype)
    _check_together(student_hidden, teacher_hidden, chunk_bytes)
    options, rows = loss_options(
        student_hidden, teacher_hidden, temperature, direction, beta, given, label_smoothing, scale_t2
    )
    flat, scale = labels_and_scale(
        student_hidden,
        labels,
        alpha=given,
        ignore_index=ignore_index,
        shift=shift,
        mask=mask,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
    )
    each = reduction == "none"
    learning = (student.hidden, student.weight, student.bias)
    needs = [not each and torch.is_grad_enabled() and x is not None and x.requires_grad for x in learning]
    constants = (None if x is None else x.detach() for x in teacher[:3])
    inputs = (*student, *constants, teacher.softcap, flat, scale, each, needs, chunk_bytes, dtype, *options)
    loss: Tensor = torch.ops.pykd.linear_kd(*inputs)[0]
    return loss.reshape(rows) if each else loss


def _autocast(hidden: Tensor) -> torch.dtype | None:
    """What autocast computes linear layers in, None where it is off or leaves them alone."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _head(
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cap_name: str,
    softcap: float | None,
    dtype: torch.dtype | None,
) -> Head:
    """The head with its positions in one dimension, checked."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != hidden.dtype and dtype is None:
            raise TypeError(f"{name} is {tensor.dtype} and {side}_hidden {hidden.dtype}: convert one, or use autocast")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and {side}_hidden on {hidden.device}: move one")
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(
            f"{side}_weight must have shape (classes, features) for {side}_hidden (..., features), at least 1 of each, "
            f"got {tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"{cap_name} must be positive and finite, got {softcap}: None switches it off")
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, softcap)


def _check_together(student_hidden: Tensor, teacher_hidden: Tensor, chunk_bytes: int) -> None:
    """ValueError unless both sides have the same positions on one device."""
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} must agree "
            "in every dimension but the last (features)"
        )
    if student_hidden.device != teacher_hidden.device:
        devices = f"on {student_hidden.device}, teacher_hidden on {teacher_hidden.device}"
        raise ValueError(f"student_hidden is {devices}: move one")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}: it bounds the logits that exist at once")
