"""What `finetune` and `distill` are watched by, when the caller leaves it to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from pykd.data.bundle import DataBundle
from pykd.evaluation.validation import validator
from pykd.training.guard import Guard
from pykd.training.watch import Validate


def watched(
    validate: Validate | None,
    guard: Guard | None,
    data: object,
    *,
    teacher: nn.Module | None = None,
    every: int | None = None,
) -> tuple[Validate | None, Guard | None]:
    """The given ones; for a guard without ``validate`` the held-out split, and the teacher's value if there is one.

    every: steps between validations, where the caller named them: then a bundle is validated without a guard too.
    Raises ValueError for a guard without both.
    """
    if guard is None:
        if validate is None and every is not None and isinstance(data, DataBundle):
            validate = validator(data)
        return validate, None
    if validate is None:
        if not isinstance(data, DataBundle):
            raise ValueError("guard needs validate, a function of the model, where the data is a loader")
        validate = validator(data)
    if guard.teacher is None and teacher is not None:
        found: dict[str, Any] = dict(validate(teacher))
        name = guard.metric or next(iter(found))
        if name in found:
            guard = replace(guard, teacher=float(found[name]))
    return validate, guard
