"""AdamW over what should be decayed and what should not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with two groups: weights are decayed, biases, normalisation
    weights and learned scores are not.

    Parameters shared by several modules are optimised once. Raises ValueError when nothing is trainable.
    """
    groups = parameter_groups([model], weight_decay=weight_decay)
    if not groups:
        raise ValueError(
            "the model has no trainable parameter: set requires_grad on what should be trained, "
            "and train before quantizing (packed weights are constants)"
        )
    return torch.optim.AdamW(groups, lr=lr)


def parameter_groups(
    models: Iterable[nn.Module], *, weight_decay: float, apart_from: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """What is trainable in some modules, each parameter once, in a decayed and in a plain group, if they hold any."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen = {id(parameter) for parameter in apart_from}
    for module in (module for model in models for module in model.modules()):
        norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (plain if norm or name.endswith("bias") or name == "scores" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
