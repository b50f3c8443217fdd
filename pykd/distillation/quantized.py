"""A teacher in fewer bits: it only has to be followed, and its passes are half of what a step costs."""

from __future__ import annotations

import copy

from torch import nn

from pykd.errors import nearest
from pykd.nn.linear_4bit import Linear4bit
from pykd.nn.linear_8bit import Linear8bit
from pykd.nn.selection import replace_layer, select_layers

#: Scheme of a quantized teacher -> the layer that takes a linear layer's place.
SCHEMES = ("w8a8", "w8a16", "w4a16")


def quantized(teacher: nn.Module, scheme: str) -> nn.Module:
    """A copy of the teacher whose linear layers are stored in 8 or 4 bits; its output heads stay as they are.

    Raises ValueError for an unknown scheme, and for a teacher without linear layers inside.

    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> type(quantized(model, "w8a8")[0]).__name__, type(quantized(model, "w8a8")[2]).__name__
    ('Linear8bit', 'Linear')
    """
    if scheme not in SCHEMES:
        raise ValueError(nearest("teacher_scheme", scheme, SCHEMES))
    smaller = copy.deepcopy(teacher).eval()
    for layer in select_layers(smaller, (nn.Linear,)).chosen.values():
        assert isinstance(layer, nn.Linear)
        kind = Linear4bit if scheme == "w4a16" else Linear8bit
        replace_layer(smaller, layer, kind.from_linear(layer, scheme=scheme))
    return smaller
