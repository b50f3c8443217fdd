"""The `torch.nn` modules of the activations that a packed linear layer applies itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

#: Name, as `pykd.ops.activation.ACTIVATIONS` has it -> the module.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


def followed_by(linear: nn.Linear, activation: str | None) -> nn.Module:
    """The layer and its activation; the layer alone when there is none."""
    return linear if activation is None else nn.Sequential(linear, MODULES[activation]())
