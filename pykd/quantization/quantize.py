"""`quantize`: store and multiply weights in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from pykd.errors import nearest
from pykd.nn import CompressedModule
from pykd.nn.selection import CONVOLUTION, LINEAR, replace_layer, select_layers
from pykd.quantization.schemes import SCHEMES, Scheme
from pykd.training.record import recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)

#: A packed layer must save this much: describing it costs some hundred bytes of the saved files.
LEAST_SAVING_BYTES = 1024


def quantize(
    model: Model,
    scheme: str | Scheme = "w4a16",
    *,
    group_size: int = 64,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Model:
    """Quantize the Linear and Conv2d layers of ``model`` in place by plain rounding; returns it.

    scheme: "w4a16", "nf4", "fp4" (weights in 4 bits) or "w8a8" (weights and, at each call, activations in 8 bits), or a
    function like those in SCHEMES. group_size: inputs that share a scale in the 4-bit schemes. include, exclude: shell
    patterns of layer names; by default all but embeddings, norms and output heads. Sparse layers keep their zeros, and
    are stored sparse where that is smaller. A layer that would save less than LEAST_SAVING_BYTES is skipped and named
    with the reason in ``model.pykd_report``. One layer at a time is held twice. Packed weights are constants: train
    before.

    Raises ValueError for an unknown scheme, a group size below 1, patterns that match nothing, NaN or infinite weights.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> type(quantize(model, "nf4")[0]).__name__
    'Linear4bit'
    """
    if not callable(scheme) and scheme not in SCHEMES:
        raise ValueError(nearest("scheme", scheme, SCHEMES))
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is the number of inputs that share a scale, at least 1, got {group_size!r}")
    pack = scheme if callable(scheme) else SCHEMES[scheme]
    require_finite_weights(model, "model")
    selection = select_layers(model, (*LINEAR, *CONVOLUTION), include=include, exclude=exclude)
    parameters = {
        "group_size": group_size,
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }
    name = scheme if isinstance(scheme, str) else getattr(scheme, "__name__", type(scheme).__name__)
    with recorded_change(model, stage="quantize", method=name, parameters=parameters) as facts:
        changed: dict[str, dict[str, Any]] = {}
        skipped = dict(selection.skipped)
        for layer_name in list(selection.chosen):
            layer = selection.chosen.pop(layer_name)
            outcome = _quantize_layer(model, layer, pack, group_size)
            if isinstance(outcome, str):
                skipped[layer_name] = outcome
            else:
                changed[layer_name] = outcome
        facts.update(changed=changed, skipped=skipped)
    return model


@torch.no_grad()
def _quantize_layer(model: nn.Module, layer: nn.Module, pack: Scheme, group_size: int) -> dict[str, Any] | str:
    """Replace one layer; what it saves, or why it was left."""
    before = stored_bytes(layer)
    packed = pack(layer.to_dense() if isinstance(layer, CompressedModule) else layer, group_size)
    after = stored_bytes(packed)
    if before - after < LEAST_SAVING_BYTES:
        return f"would be stored in {after} instead of {before} bytes: no gain"
    replace_layer(model, layer, packed)
    return {"type": type(packed).__name__, "bytes_before": before, "bytes_after": after}


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors in a saved file."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())
