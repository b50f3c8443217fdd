"""Activation functions at the end of a linear layer: their names, and what they do where no kernel applies them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.errors import nearest

#: Name -> number that the native kernels know. None: the result as it is. "gelu": x times the distribution function of
#: the normal distribution (Hendrycks and Gimpel 2016), "gelu_tanh" their approximation; "silu": x times its sigmoid.
ACTIVATIONS: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}


def check_activation(activation: str | None) -> None:
    """Raise ValueError for an unknown name."""
    if activation not in ACTIVATIONS:
        raise ValueError(nearest("activation", activation, [name for name in ACTIVATIONS if name]))


def activate(x: Tensor, activation: str | None) -> Tensor:
    """torch's function of that name; None returns x."""
    if activation is None:
        return x
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.silu(x) if activation == "silu" else torch.relu(x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str | None) -> Tensor:
    """The gradient with respect to x of `activate(x, activation)`, from that of its result; both of one dtype."""
    if activation is None:
        return grad
    if activation.startswith("gelu"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        result: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    elif activation == "silu":
        result = torch.ops.aten.silu_backward(grad, x)
    else:
        result = torch.ops.aten.threshold_backward(grad, x, 0)
    return result
