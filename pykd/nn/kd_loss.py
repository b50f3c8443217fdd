"""`KDLoss`: the distillation loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pykd.ops.kd_loss import kd_loss


class KDLoss(nn.Module):
    """Knowledge distillation loss (Hinton et al., 2015) as a module over `pykd.kd_loss`, which explains every option.

    `alpha * T^2 * D(teacher / T, student / T) + (1 - alpha) * CE(student, labels)`, for logits (..., classes) and
    labels (...). Options are those of `kd_loss`; what changes from batch to batch (mask, weights, num_items) goes to
    the call. Errors are those of `kd_loss`, at the call.

    >>> import torch
    >>> from pykd.nn import KDLoss
    >>> loss = KDLoss(temperature=2.0, alpha=0.7)
    >>> loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2])).item() < 0.33
    True
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        *,
        direction: str = "forward",
        beta: float | None = None,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        shift: bool = False,
        scale_t2: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "alpha": alpha,
            "direction": direction,
            "beta": beta,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "shift": shift,
            "scale_t2": scale_t2,
            "inplace": inplace,
        }

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, as `kd_loss(student_logits, teacher_logits, labels, ...)`."""
        call: dict[str, Any] = {"mask": mask, "weights": weights, "num_items": num_items}
        return kd_loss(student_logits, teacher_logits, labels, **self.options, **call)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
