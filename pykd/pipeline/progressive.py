"""Progressive quantization: fewer bits step by step, and training with the teacher in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from pykd.data import DataBundle
from pykd.distillation import distill
from pykd.quantization import check_qat, convert_qat, prepare_qat
from pykd.training.source import Loader

Model = TypeVar("Model", bound=nn.Module)

#: 16, 8, 4 bits.
STEPS = ("bf16", "w8a16", "w4a16")


def quantize_progressively(
    model: Model,
    teacher: nn.Module,
    data: DataBundle | Loader,
    schemes: Sequence[str] = STEPS,
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    search_every: int = 50,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    epochs: float = 0.5,
    lr: float = 1e-4,
    **options: Any,
) -> Model:
    """Quantize ``model`` in place to fewer bits step by step, each followed by training; returns it.

    Every step is quantization-aware training with the teacher, from the rounded weights of the step before (after
    Zhuang et al. 2018, section 3.2): `prepare_qat`, `distill`, `convert_qat`, each recorded in ``pykd_report``. As a
    recipe: stages ``qat`` one after another, each measured and saved, resumed where it was interrupted.

    Args:
        schemes: names, from more bits to fewer, as for `prepare_qat`; so are group_size, symmetric, search_every,
            include and exclude.
        epochs, lr: of the training in each step; options: the others of `distill`.

    Raises ValueError for no scheme, one that cannot be trained, and as `distill` does.

    >>> import copy, torch
    >>> rows = [{"pixel_values": torch.randn(8, 64), "labels": torch.zeros(8, dtype=torch.int64)}]
    >>> teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> student = quantize_progressively(copy.deepcopy(teacher), teacher, rows, epochs=1, progress=False)
    >>> [entry["parameters"]["scheme"] for entry in student.pykd_report if entry["stage"] == "quantize"]
    ['bf16', 'w8a16', 'w4a16']
    """
    if not schemes:
        raise ValueError(f"schemes names no step: give schemes of fewer and fewer bits, such as {STEPS}")
    for scheme in schemes:
        check_qat(scheme, group_size=group_size, symmetric=symmetric or scheme not in ("w4a16", "w4a8"))
    layers: dict[str, Any] = {"search_every": search_every, "include": include, "exclude": exclude}
    for scheme in schemes:
        even = symmetric or scheme not in ("w4a16", "w4a8")
        prepare_qat(model, scheme, group_size=group_size, symmetric=even, **layers)
        distill(model, teacher, data, epochs=epochs, lr=lr, **options)
        convert_qat(model)
    return model
