"""AdamW over what should be decayed and what should not."""

from __future__ import annotations

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with two groups: weights are decayed, biases and normalisation weights are not.

    Parameters shared by several modules are optimised once. Raises ValueError when nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (plain if norm or name.endswith("bias") else decayed).append(parameter)
    if not seen:
        raise ValueError(
            "the model has no trainable parameter: set requires_grad on what should be trained, "
            "and train before quantizing (packed weights are constants)"
        )
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)
