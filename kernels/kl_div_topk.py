"""Distillation from kept classes and its gradient on a GPU: one program per row of the student's logits.

The kept classes, few and in ascending order, are gathered first. Pass 1 sums the exponentials of all other classes,
against a maximum of their own, so that their mass is never 1 - the kept mass. Pass 2 writes the gradient, in place if
the caller wants: each block of classes is read and written by the same program only. In both passes a block takes
from the list the ids that lie in it, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _raised(total, old_max, new_max, a):
    """A sum of e^(a (x - old_max)) relative to new_max; 0 where nothing finite was seen before."""
    return tl.where(old_max == float("-inf"), total, total * tl.exp2((old_max - new_max) * (a * _LOG2E)))


@triton.jit
def _reference(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def kl_div_topk_kernel(
    student_pointer,  # [rows, classes], rows student_stride elements apart
    ids_pointer,  # [rows, kept] int64, distinct, ascending; an id >= classes ends the list
    target_pointer,  # [rows, kept] float32
    rest_pointer,  # [rows] float32: the teacher's mass outside the kept classes; unused without tail
    labels_pointer,  # [rows] int64, in [0, classes) where scale is not 0; unused without labels
    scale_pointer,  # [rows] float32; 0 skips the row
    losses_pointer,  # [rows] float32
    gradient_pointer,  # [rows, classes] contiguous, or the student itself; unused without gradient
    classes,
    kept,
    student_stride,
    a,  # 1 / temperature
    kl_weight,
    ce_weight,
    smoothing,
    tail: tl.constexpr,
    has_labels: tl.constexpr,
    need_grad: tl.constexpr,
    block: tl.constexpr,
    kept_block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2^31 for 14,000 rows of 152,000 classes
    student = student_pointer + row * student_stride
    gradient = gradient_pointer + row * classes
    ids = ids_pointer + row * kept
    target = target_pointer + row * kept
    columns = tl.arange(0, block)
    places = tl.arange(0, kept_block)
    scale = tl.load(scale_pointer + row)
    none = float("-inf")
    infinite = float("inf")

    if scale == 0.0:
        tl.store(losses_pointer + row, 0.0)
        if need_grad:
            zeros = tl.zeros((block,), dtype=tl.float32).to(gradient_pointer.dtype.element_ty)
            for start in range(0, classes, block):
                tl.store(gradient + start + columns, zeros, mask=start + columns < classes)
        return

    label = 0
    label_logit = 0.0
    if has_labels:
        label = tl.load(labels_pointer + row)
        label_logit = tl.load(student + label).to(tl.float32)

    # The kept classes: maximum, sums, mass.
    k_max = none
    k_sum = 0.0
    k_label_sum = 0.0
    mass = 0.0
    for start in range(0, kept, kept_block):
        each = tl.load(ids + start + places, mask=start + places < kept, other=classes)
        s = tl.load(student + each, mask=each < classes, other=none).to(tl.float32)
        new_max = tl.maximum(k_max, tl.max(s, 0))
        reference = _reference(new_max)
        k_sum = _raised(k_sum, k_max, reference, a) + tl.sum(tl.exp2((s - reference) * (a * _LOG2E)), 0)
        if has_labels:
            k_label_sum = _raised(k_label_sum, k_max, reference, 1.0) + tl.sum(tl.exp2((s - reference) * _LOG2E), 0)
        mass += tl.sum(tl.load(target + start + places, mask=start + places < kept, other=0.0), 0)
        k_max = new_max

    # Pass 1: the same of all other classes, and the sum of every logit.
    o_max = none
    o_sum = 0.0
    o_label_sum = 0.0
    logit_sum = 0.0
    place = 0
    for start in range(0, classes, block):
        s = tl.load(student + start + columns, mask=start + columns < classes, other=none).to(tl.float32)
        if has_labels:
            logit_sum += tl.sum(tl.where(start + columns < classes, s, 0.0), 0)
        each = tl.load(ids + place, mask=place < kept, other=classes)
        while each < tl.minimum(start + block, classes):
            s = tl.where(start + columns == each, none, s)
            place += 1
            each = tl.load(ids + place, mask=place < kept, other=classes)
        new_max = tl.maximum(o_max, tl.max(s, 0))
        reference = _reference(new_max)
        o_sum = _raised(o_sum, o_max, reference, a) + tl.sum(tl.exp2((s - reference) * (a * _LOG2E)), 0)
        if has_labels:
            o_label_sum = _raised(o_label_sum, o_max, reference, 1.0) + tl.sum(tl.exp2((s - reference) * _LOG2E), 0)
        o_max = new_max

    # Both together, relative to one reference.
    reference = _reference(tl.maximum(k_max, o_max))
    total = _raised(k_sum, k_max, reference, a) + _raised(o_sum, o_max, reference, a)
    label_total = _raised(k_label_sum, k_max, reference, 1.0) + _raised(o_label_sum, o_max, reference, 1.0)
    log_total = tl.log(total)
    nothing = total == 0.0  # every logit is -inf
    o_reference = _reference(o_max)
    log_o_sum = tl.log(o_sum)
    rest = 0.0
    if tail:
        rest = tl.load(rest_pointer + row)

    value = 0.0
    for start in range(0, kept, kept_block):
        each = tl.load(ids + start + places, mask=start + places < kept, other=classes)
        s = tl.load(student + each, mask=each < classes, other=none).to(tl.float32)
        q = tl.load(target + start + places, mask=start + places < kept, other=0.0)
        terms = q * (tl.log(q) - ((s - reference) * a - log_total))
        value += tl.sum(tl.where(q == 0.0, 0.0, tl.where(s == none, infinite, terms)), 0)
    if tail:
        log_others = log_o_sum + (o_reference - reference) * a - log_total
        term = tl.where(o_sum == 0.0, infinite, rest * (tl.log(rest) - log_others))
        value += tl.where(rest == 0.0, 0.0, term)
    mass += rest
    value = tl.where(nothing, tl.where(mass == 0.0, 0.0, mass * infinite), tl.where(total != total, total, value))

    if need_grad:
        place = 0
        kl_factor = scale * kl_weight * a
        for start in range(0, classes, block):
            s = tl.load(student + start + columns, mask=start + columns < classes, other=none).to(tl.float32)
            q = tl.zeros((block,), dtype=tl.float32)
            if tail:
                share = tl.exp2(tl.minimum(s - o_reference, 0.0) * (a * _LOG2E)) / o_sum  # kept logits may be higher
                q = tl.where(s == none, 0.0, rest * share)
            each = tl.load(ids + place, mask=place < kept, other=classes)
            while each < tl.minimum(start + block, classes):
                q = tl.where(start + columns == each, tl.load(target + place), q)
                place += 1
                each = tl.load(ids + place, mask=place < kept, other=classes)
            p = tl.exp2((s - reference) * (a * _LOG2E)) / total
            out = tl.where(nothing | (kl_weight == 0.0), 0.0, kl_factor * (mass * p - q))
            if has_labels:
                label_p = tl.exp2((s - reference) * _LOG2E) / label_total
                label_target = tl.where(start + columns == label, 1.0 - smoothing, 0.0) + smoothing / classes
                out += tl.where(nothing, 0.0, scale * ce_weight * (label_p - label_target))
            out = out.to(gradient_pointer.dtype.element_ty)
            tl.store(gradient + start + columns, out, mask=start + columns < classes)

    loss = tl.where(kl_weight == 0.0, 0.0, kl_weight * value)
    if has_labels:
        log_sum = tl.log(label_total) + reference
        entropy = (1.0 - smoothing) * (log_sum - label_logit)
        entropy += tl.where(smoothing == 0.0, 0.0, smoothing * (log_sum - logit_sum / classes))
        loss += ce_weight * tl.where(nothing, infinite, entropy)
    tl.store(losses_pointer + row, scale * loss)


def kl_div_topk(
    student: torch.Tensor,
    ids: torch.Tensor,
    target: torch.Tensor,
    rest: torch.Tensor | None,
    labels: torch.Tensor | None,
    scale: torch.Tensor,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
    *,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    label_smoothing: float,
) -> None:
    """Launch on the current stream. Classes adjacent in memory; everything else was prepared by pykd.ops."""
    rows, classes = student.shape
    if rows == 0:
        return
    has_labels = labels is not None and ce_weight != 0
    block = min(4096, triton.next_power_of_2(classes))
    kl_div_topk_kernel[(rows,)](
        student,
        ids,
        target,
        rest if rest is not None else scale,
        labels if has_labels else ids,
        scale,
        losses,
        gradient if gradient is not None else student,
        classes,
        ids.shape[1],
        student.stride(0),
        1.0 / temperature,
        kl_weight,
        ce_weight,
        label_smoothing,
        tail=rest is not None,
        has_labels=has_labels,
        need_grad=gradient is not None,
        block=block,
        kept_block=min(1024, triton.next_power_of_2(max(ids.shape[1], 1))),
        num_warps=4 if block <= 1024 else 8,
    )
