"""Distillation losses and their gradient on a GPU: one program per row of logits.

Pass 1 reads both rows and keeps, relative to the running maxima, the sums of exponentials and the divergence's cross
term (the formulas of csrc/cuda/kl_div_device.cuh); the gradient takes one more pass, in which two factors per row are
all it needs. jsd and tv sum over the probabilities first and take a pass between. The gradient may overwrite the
student's logits: each block of classes is read and written by the same program only.

Sums are kept per lane and reduced once per row; only the maxima are reduced per block. A block of 4096 classes on 16
warps is one 16-byte load of half types per thread and input, and leaves few enough rows in flight (two programs to a
multiprocessor: 2 x 132 x 131 KB at 32768 classes of half types) for the second read to come from an H100's L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FORWARD: tl.constexpr = tl.constexpr(0)
REVERSE: tl.constexpr = tl.constexpr(1)
JSD: tl.constexpr = tl.constexpr(2)

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
_LOWEST: tl.constexpr = tl.constexpr(-1e30)  # exponents stay above: probability 0 times them is 0, not NaN


@triton.jit
def _logits(pointer, columns, classes, keep: tl.constexpr):
    """One block as float32; classes that do not exist are -inf. `keep`: L2 shall hold it, it will be read again."""
    policy: tl.constexpr = "evict_last" if keep else "evict_first"
    logits = tl.load(pointer + columns, mask=columns < classes, other=float("-inf"), eviction_policy=policy)
    return logits.to(tl.float32)


@triton.jit
def _exponents(logits, reference, k):
    """(logits - reference) * k, held above _LOWEST; NaN stays."""
    x = (logits - reference) * k
    return tl.where(x < _LOWEST, _LOWEST, x)


@triton.jit
def _rise(before, after, k):
    """How far a running maximum rose, in powers of two; 0 from "nothing yet" (-inf)."""
    return tl.where(before == float("-inf"), 0.0, tl.minimum((after - before) * k, -_LOWEST))


@triton.jit
def _or_zero(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _mixture(p, q, beta, direction: tl.constexpr):
    """(loss terms, P * g) of jsd in units of ln 2, or of tv in units of 1 / 2; g is the derivative of the loss by P."""
    if direction == JSD:
        mixture = tl.maximum(beta * q + (1.0 - beta) * p, _TINY)
        slope = (1.0 - beta) * p * tl.log2(tl.maximum(p / mixture, _TINY))
        value = beta * q * tl.log2(tl.maximum(q / mixture, _TINY)) + slope
    else:
        sign = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
        value = sign * (p - q)
        slope = sign * p
    return value, slope


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
    mixed: tl.constexpr = direction != FORWARD and direction != REVERSE

    if scale == 0.0:
        tl.store(losses_pointer + row, 0.0)
        if need_grad:
            zeros = tl.zeros((block,), dtype=tl.float32).to(gradient_pointer.dtype.element_ty)
            for start in range(0, student_classes, block):
                tl.store(gradient + start + columns, zeros, mask=start + columns < student_classes)
        return

    # Pass 1: maxima, and sums per lane relative to them. A reference stays 0 until something finite has been seen.
    k = a * _LOG2E
    s_max = none
    t_max = none
    s_sums = tl.zeros((block,), dtype=tl.float32)
    t_sums = tl.zeros((block,), dtype=tl.float32)
    crosses = tl.zeros((block,), dtype=tl.float32)
    lacking = tl.zeros((block,), dtype=tl.int32)
    label_sums = tl.zeros((block,), dtype=tl.float32)
    logit_sums = tl.zeros((block,), dtype=tl.float32)
    origin = 0.0
    label = 0
    label_logit = 0.0
    if has_labels:
        # Here, where reductions still follow: after the last one a faster warp may overwrite it in place.
        label = tl.load(labels_pointer + row)
        label_logit = tl.load(student + label).to(tl.float32)
        first = tl.load(student).to(tl.float32)
        origin = tl.where(tl.abs(first) < infinite, first, 0.0)
    for start in range(0, classes, block):
        s = _logits(student, start + columns, student_classes, need_grad or mixed)
        t = _logits(teacher, start + columns, teacher_classes, need_grad or mixed)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        s_rise = _rise(s_max, s_new, k)
        t_rise = _rise(t_max, t_new, k)
        s_fall = tl.exp2(-s_rise)
        t_fall = tl.exp2(-t_rise)
        xs = _exponents(s, _or_zero(s_new), k)
        xt = _exponents(t, _or_zero(t_new), k)
        es = tl.exp2(xs)
        et = tl.exp2(xt)
        if direction == FORWARD:
            crosses = (crosses + t_sums * (s_rise - t_rise)) * t_fall + et * (xt - xs)
            lacking = lacking | ((s == none) & (t != none)).to(tl.int32)
        if direction == REVERSE:
            crosses = (crosses + s_sums * (t_rise - s_rise)) * s_fall + es * (xs - xt)
            lacking = lacking | ((t == none) & (s != none)).to(tl.int32)
        s_sums = s_sums * s_fall + es
        t_sums = t_sums * t_fall + et
        if has_labels:
            label_sums = label_sums * tl.exp2(-_rise(s_max, s_new, _LOG2E))
            label_sums += tl.exp2((s - _or_zero(s_new)) * _LOG2E)
            logit_sums += tl.where(start + columns < student_classes, s - origin, 0.0)
        s_max = s_new
        t_max = t_new
    s_ref = _or_zero(s_max)
    t_ref = _or_zero(t_max)
    s_sum = tl.sum(s_sums, 0)
    t_sum = tl.sum(t_sums, 0)
    s_nothing = s_sum == 0.0  # every logit is -inf
    t_nothing = t_sum == 0.0
    p_scale = tl.where(s_nothing, 0.0, 1.0 / s_sum)
    q_scale = tl.where(t_nothing, 0.0, 1.0 / t_sum)
    missing = False
    mean = 0.0  # of the difference of exponents, under Q (reverse: P)

    # The divergence: from the sums, or by a pass over the probabilities.
    slope_sum = 0.0
    if mixed:
        values = tl.zeros((block,), dtype=tl.float32)
        slopes = tl.zeros((block,), dtype=tl.float32)
        for start in range(0, classes, block):
            s = _logits(student, start + columns, student_classes, need_grad)
            t = _logits(teacher, start + columns, teacher_classes, need_grad)
            p = tl.exp2((s - s_ref) * k) * p_scale
            terms, slope = _mixture(p, tl.exp2((t - t_ref) * k) * q_scale, beta, direction)
            values += terms
            slopes += slope
        unit = _LN2 if direction == JSD else 0.5
        value = unit * tl.sum(values, 0)
        slope_sum = tl.sum(slopes, 0)
    else:
        missing = tl.max(lacking, 0) != 0
        distance = tl.log2(s_sum) - tl.log2(t_sum)
        if direction == FORWARD:
            unit = 1.0
            mean = tl.sum(crosses, 0) * q_scale
            value = _LN2 * (mean + distance)
        else:
            unit = _LN2
            mean = tl.sum(crosses, 0) / tl.where(s_nothing, 1.0, s_sum)
            value = _LN2 * (mean - distance)
        value = tl.where(missing, infinite, value)
    value = tl.where(s_nothing & t_nothing, 0.0, tl.where(s_nothing | t_nothing, infinite, value))
    value = tl.where((s_sum != s_sum) | (t_sum != t_sum), float("nan"), value)

    label_sum = 1.0
    if has_labels:
        label_sum = tl.sum(label_sums, 0)

    if need_grad:
        flat = s_nothing | t_nothing
        if direction == REVERSE:
            flat = flat | missing
        factor = tl.where(flat, 0.0, scale * kl_weight * a * unit)
        factor = tl.where(value != value, value, factor)  # tv's signs would hide a NaN
        p_factor = factor * p_scale
        q_factor = factor * q_scale
        label_factor = tl.where(s_nothing, 0.0, scale * ce_weight)
        label_p = label_factor / tl.where(s_nothing, 1.0, label_sum)
        for start in range(0, classes, block):
            s = _logits(student, start + columns, student_classes, False)
            t = _logits(teacher, start + columns, teacher_classes, False)
            xs = _exponents(s, s_ref, k)
            xt = _exponents(t, t_ref, k)
            es = tl.exp2(xs)
            if direction == FORWARD:
                out = es * p_factor - tl.exp2(xt) * q_factor
            elif direction == REVERSE:
                out = es * ((xs - xt - mean) * p_factor)
            else:
                p = es * p_scale
                _, slope = _mixture(p, tl.exp2(xt) * q_scale, beta, direction)
                out = factor * (slope - p * slope_sum)
            if has_labels:
                target = tl.where(start + columns == label, 1.0 - smoothing, 0.0) + smoothing / student_classes
                out += tl.exp2((s - s_ref) * _LOG2E) * label_p - target * label_factor
            out = out.to(gradient_pointer.dtype.element_ty)
            tl.store(gradient + start + columns, out, mask=start + columns < student_classes)

    loss = tl.where(kl_weight == 0.0, 0.0, kl_weight * value)
    if has_labels:
        log_sum = tl.log(label_sum) + s_ref
        entropy = (1.0 - smoothing) * (log_sum - label_logit)
        mean_logit = origin + tl.sum(logit_sums, 0) / student_classes
        entropy += tl.where(smoothing == 0.0, 0.0, smoothing * (log_sum - mean_logit))
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
    widest = max(classes, teacher.shape[1])
    block = min(4096, triton.next_power_of_2(widest))
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
        num_warps=4 if block <= 1024 else 8 if widest <= block else 16,
    )
