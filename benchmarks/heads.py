"""Hidden states and output heads of a student and a teacher, from which `linear_kd_loss` and its peers are computed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Heads:
    """Those of one shape; the student's require gradients."""

    def __init__(
        self, positions: int, features: int, classes: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        make = functools.partial(torch.randn, generator=generator, device=device)
        spread = 3 / features**0.5  # logits of standard deviation 3
        self.hidden, self.teacher_hidden = (make(positions, features).to(dtype) for _ in range(2))
        self.weight, self.teacher_weight = (make(classes, features).mul_(spread).to(dtype) for _ in range(2))
        self.labels = torch.randint(0, classes, (positions,), generator=generator, device=device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def differentiated(self, loss: Tensor) -> tuple[Tensor, ...]:
        """(loss, its gradients of hidden and weight)."""
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))
