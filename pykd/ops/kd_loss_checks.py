"""What the public distillation losses share: checks of their arguments, the scale of each position, the reduction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("batchmean", "sum", "none")


def check_shares(alpha: float, label_smoothing: float) -> None:
    """ValueError for a share outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}: it is the share of the distillation term")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_temperature(name: str, temperature: float) -> None:
    """ValueError unless 0 < temperature < inf."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name} must be positive and finite, got {temperature}")


def check_logits(name: str, logits: Tensor) -> None:
    """TypeError or ValueError unless floating point with at least one class."""
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logits.dtype}: pass logits, not class indices")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} needs a last dimension of at least one class, got shape {tuple(logits.shape)}")


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    """ValueError for an unknown reduction or a divisor that is none."""
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


def check_integers(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor holds class indices."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}: pass class indices, not probabilities")


def check_positions(name: str, tensor: Tensor, rows: torch.Size, device: torch.device) -> None:
    """ValueError unless the tensor has one entry per position, where the student's logits are."""
    if tensor.shape != rows:
        raise ValueError(f"{name} must have one entry per position, shape {tuple(rows)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} are on {tensor.device} and student_logits on {device}: move one")


def labels_and_scale(
    student: Tensor,
    labels: Tensor | None,
    *,
    alpha: float,
    ignore_index: int,
    shift: bool,
    mask: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Labels (rows,) as int64, and the scale of each position, for student (..., classes); all checked."""
    rows, device = student.shape[:-1], student.device
    check_reduction(reduction, num_items)
    if labels is not None:
        check_integers("labels", labels)
        check_positions("labels", labels, rows, device)
    elif alpha != 1:
        raise ValueError(f"labels are needed for the label term: pass labels, or alpha=1 (got alpha={alpha})")
    if shift:
        labels, mask, weights = _shifted(rows, labels, mask, weights, device)
    valid = None if labels is None else labels.reshape(-1) != ignore_index
    scale = row_scale(student, valid, mask, weights, reduction, num_items)
    return None if labels is None else labels.reshape(-1).long(), scale


def row_scale(
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
        check_positions("mask", mask, rows, device)
        valid = mask.reshape(-1) if valid is None else valid & mask.reshape(-1)
    divisor: Any = num_items
    if reduction == "batchmean" and divisor is None:
        divisor = max(rows.numel(), 1) if valid is None else valid.sum().clamp(min=1)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(device=device, dtype=dtype, non_blocking=True).reshape(())
    if weights is None:
        scale = torch.ones(rows.numel(), dtype=dtype, device=device)
    else:
        check_positions("weights", weights, rows, device)
        scale = weights.detach().reshape(-1).to(dtype)
    if divisor is not None:
        scale = scale / divisor
    return scale if valid is None else torch.where(valid, scale, 0.0)


def _shifted(
    rows: torch.Size, labels: Tensor | None, mask: Tensor | None, weights: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Labels, mask and weights moved one position to the left, with the last position masked."""
    if not rows:
        raise ValueError("shift=True needs logits of shape (..., time, classes), got a single position")
    last = torch.zeros(rows, dtype=torch.bool, device=device)
    last[..., -1:] = True
    if mask is None:
        mask = ~last
    else:
        check_positions("mask", mask, rows, device)
        mask = mask.roll(-1, -1) & ~last
    labels = None if labels is None else labels.roll(-1, -1)
    return labels, mask, None if weights is None else weights.roll(-1, -1)


def reduce(losses: Tensor, reduction: str, rows: torch.Size) -> Tensor:
    """One value a position, or the sum: the divisor is already in the scale."""
    return losses.reshape(rows) if reduction == "none" else losses.sum()
