"""From what a caller says to the losses of a distillation: its teachers, their shares, and the sum of the terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pykd.distillation.checks import common_classes
from pykd.distillation.methods import Weighted
from pykd.distillation.quantized import quantized
from pykd.distillation.terms import Terms


def assemble(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    methods: Sequence[Weighted],
    *,
    teacher_weights: Sequence[float] | None,
    teacher_scheme: str | None,
    temperature: float,
    alpha: float,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
) -> Terms:
    """The sum of losses of a student against one teacher or several; options and errors are those of `distill`."""
    teachers = list(teacher) if isinstance(teacher, Sequence) else [teacher]
    shares = _shares(teacher_weights, len(teachers))
    pair = {"student_tokenizer": student_tokenizer, "teacher_tokenizer": teacher_tokenizer}
    classes = min(common_classes(student, each, **pair) for each in teachers)
    if teacher_scheme is not None:
        teachers = [quantized(each, teacher_scheme) for each in teachers]
    return Terms(methods, student, teachers, shares, temperature=temperature, alpha=alpha, classes=classes)


def _shares(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """Weights of the teachers, scaled to add up to 1."""
    if teachers == 0:
        raise ValueError("distill needs a teacher, or several in a list, got an empty one")
    found = [1.0] * teachers if weights is None else [float(weight) for weight in weights]
    if len(found) != teachers or any(not 0 < weight < float("inf") for weight in found):
        raise ValueError(f"teacher_weights must be {teachers} positive numbers, one for each teacher, got {weights}")
    return [weight / sum(found) for weight in found]
