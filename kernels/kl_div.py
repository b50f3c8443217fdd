"""Distillation losses and their gradient on a GPU: one program per row of logits.

Pass 1 finds both maxima and normalisers (online softmax). `forward` then needs one more pass, in which its value and
gradient come together; the other directions' gradients need their row sums first, so they take a pass between. The
gradient may overwrite the student's logits: each block of classes is read and written by the same program only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _logits(pointer, columns, classes):
    """One block as float32; classes that do not exist are -inf."""
    return tl.load(pointer + columns, mask=columns < classes, other=float("-inf")).to(tl.float32)


@triton.jit
def _terms(s, t, log_p, log_q, beta, direction: tl.constexpr):
    """(loss terms, P * g) of one block: g is the derivative of the divergence by P. Finite wherever P and Q are 0."""
    none = float("-inf")
    infinite = float("inf")
    p = tl.where(s == none, 0.0, tl.exp(log_p))
    q = tl.where(t == none, 0.0, tl.exp(log_q))
    if direction == FORWARD:
        value = tl.where(t == none, 0.0, tl.where(s == none, infinite, q * (log_q - log_p)))
        slope = p - q
    elif direction == REVERSE:
        value = tl.where(s == none, 0.0, tl.where(t == none, infinite, p * (log_p - log_q)))
        slope = value
    elif direction == JSD:
        mixture = tl.maximum(beta * q + (1.0 - beta) * p, _TINY)
        slope = p * tl.log(tl.maximum(p / mixture, _TINY))
        value = beta * q * tl.log(tl.maximum(q / mixture, _TINY)) + (1.0 - beta) * slope
        slope = (1.0 - beta) * slope
    else:
        sign = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
        value = sign * (p - q)
        slope = sign * p
    return p, value, slope


@triton.jit
def kl_div_kernel(
    student_pointer,  # [rows, student_classes], rows student_stride elements apart
    teacher_pointer,  # [rows, teacher_classes]
    labels_pointer,  # [rows] int64, in [0, student_classes) where scale is not 0; unused without labels
    scale_pointer,  # [rows] float32; 0 skips the row
    losses_pointer,  # [rows] float32
    gradient_pointer,  # [rows, student_classes] contiguous, or the student itself; unused without gradient
    student_classes,
    teacher_classes,
    student_stride,
    teacher_stride,
    a,  # 1 / temperature
    beta,
    kl_weight,
    ce_weight,
    smoothing,
    direction: tl.constexpr,
    has_labels: tl.constexpr,
    need_grad: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31 for 14,000 rows of 152,000 classes
    student = student_pointer + row * student_stride
    teacher = teacher_pointer + row * teacher_stride
    gradient = gradient_pointer + row * student_classes
    classes = tl.maximum(student_classes, teacher_classes)
    columns = tl.arange(0, block)
    scale = tl.load(scale_pointer + row)
    none = float("-inf")
    infinite = float("inf")

    if scale == 0.0:
        tl.store(losses_pointer + row, 0.0)
        if need_grad:
            zeros = tl.zeros((block,), dtype=tl.float32).to(gradient_pointer.dtype.element_ty)
            for start in range(0, student_classes, block):
                tl.store(gradient + start + columns, zeros, mask=start + columns < student_classes)
        return

    # Pass 1: maxima and normalisers. A reference stays 0 until something finite has been seen.
    s_max = none
    t_max = none
    s_sum = 0.0
    t_sum = 0.0
    label_sum = 0.0
    logit_sum = 0.0
    for start in range(0, classes, block):
        s = _logits(student, start + columns, student_classes)
        t = _logits(teacher, start + columns, teacher_classes)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        s_ref = tl.where(s_new == none, 0.0, s_new)
        t_ref = tl.where(t_new == none, 0.0, t_new)
        s_sum = s_sum * tl.exp2((s_max - s_ref) * (a * _LOG2E)) + tl.sum(tl.exp2((s - s_ref) * (a * _LOG2E)), 0)
        t_sum = t_sum * tl.exp2((t_max - t_ref) * (a * _LOG2E)) + tl.sum(tl.exp2((t - t_ref) * (a * _LOG2E)), 0)
        if has_labels:
            label_sum = label_sum * tl.exp2((s_max - s_ref) * _LOG2E) + tl.sum(tl.exp2((s - s_ref) * _LOG2E), 0)
            logit_sum += tl.sum(tl.where(start + columns < student_classes, s, 0.0), 0)
        s_max = s_new
        t_max = t_new
    s_ref = tl.where(s_max == none, 0.0, s_max)
    t_ref = tl.where(t_max == none, 0.0, t_max)
    s_log = tl.log(s_sum)
    t_log = tl.log(t_sum)
    s_nothing = s_sum == 0.0  # every logit is -inf
    t_nothing = t_sum == 0.0

    # Between: the divergence and the sum of P * g, wherever the gradient needs them first.
    value = 0.0
    slope_sum = 0.0
    if direction != FORWARD or not need_grad:
        for start in range(0, classes, block):
            s = _logits(student, start + columns, student_classes)
            t = _logits(teacher, start + columns, teacher_classes)
            p, terms, slope = _terms(s, t, (s - s_ref) * a - s_log, (t - t_ref) * a - t_log, beta, direction)
            value += tl.sum(terms, 0)
            slope_sum += tl.sum(slope, 0)

    label = 0
    if has_labels:
        label = tl.load(labels_pointer + row)
        label_logit = tl.load(student + label).to(tl.float32)

    if need_grad:
        flat = s_nothing | t_nothing
        if direction == REVERSE:
            flat = flat | (value == infinite)
        kl_factor = tl.where(value != value, value, scale * kl_weight * a)  # tv's signs would hide a NaN
        for start in range(0, classes, block):
            s = _logits(student, start + columns, student_classes)
            t = _logits(teacher, start + columns, teacher_classes)
            p, terms, slope = _terms(s, t, (s - s_ref) * a - s_log, (t - t_ref) * a - t_log, beta, direction)
            if direction == FORWARD:
                value += tl.sum(terms, 0)
            else:
                slope = slope - p * slope_sum
            out = tl.where(flat, 0.0, kl_factor * slope)
            if has_labels:
                label_p = tl.exp2((s - s_ref) * _LOG2E) / label_sum
                target = tl.where(start + columns == label, 1.0 - smoothing, 0.0) + smoothing / student_classes
                out += tl.where(s_nothing, 0.0, scale * ce_weight * (label_p - target))
            out = out.to(gradient_pointer.dtype.element_ty)
            tl.store(gradient + start + columns, out, mask=start + columns < student_classes)

    value = tl.where(s_nothing & t_nothing, 0.0, tl.where(s_nothing | t_nothing, infinite, value))
    loss = tl.where(kl_weight == 0.0, 0.0, kl_weight * value)
    if has_labels:
        log_sum = tl.log(label_sum) + s_ref
        entropy = (1.0 - smoothing) * (log_sum - label_logit)
        entropy += tl.where(smoothing == 0.0, 0.0, smoothing * (log_sum - logit_sum / student_classes))
        loss += ce_weight * tl.where(s_nothing, infinite, entropy)
    tl.store(losses_pointer + row, scale * loss)


def kl_div(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    scale: torch.Tensor,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
    *,
    temperature: float,
    direction: int,
    beta: float,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
) -> None:
    """Launch on the current stream. Classes adjacent in memory; everything else was checked by pykd.ops.kl_div."""
    rows, classes = student.shape
    if rows == 0:
        return
    has_labels = labels is not None and ce_weight != 0
    block = min(4096, triton.next_power_of_2(max(classes, teacher.shape[1])))
    kl_div_kernel[(rows,)](
        student,
        teacher,
        labels if has_labels else student,
        scale,
        losses,
        gradient if gradient is not None else student,
        classes,
        teacher.shape[1],
        student.stride(0),
        teacher.stride(0),
        1.0 / temperature,
        beta,
        kl_weight,
        ce_weight,
        label_smoothing,
        direction=direction,
        has_labels=has_labels,
        need_grad=gradient is not None,
        block=block,
        num_warps=4 if block <= 1024 else 8,
    )
