"""One layer as JSON: the type and the arguments that an empty layer of the same shape is built with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pykd.errors import ArtifactError, nearest
from pykd.nn import COMPRESSED
from pykd.nn.compressed import CompressedModule

#: Plain layers that are described by the arguments of their constructor.
PLAIN: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    "BatchNorm2d": (nn.BatchNorm2d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "Embedding": (
        nn.Embedding,
        ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
    ),
    "Identity": (nn.Identity, ()),
}
#: Those of them whose bias is optional.
BIASED = ("Linear", "Conv2d", "LayerNorm")


def describe(module: nn.Module) -> dict[str, Any] | None:
    """JSON description of a layer, or None for a class that is described by its skeleton only.

    >>> describe(nn.Linear(3, 2))
    {'type': 'Linear', 'in_features': 3, 'out_features': 2, 'bias': True}
    """
    if isinstance(module, CompressedModule):
        return module.spec()
    name = type(module).__name__
    plain, arguments = PLAIN.get(name, (None, ()))
    if type(module) is not plain:
        return None
    spec: dict[str, Any] = {"type": name}
    for argument in arguments:
        value = getattr(module, argument)
        spec[argument] = list(value) if isinstance(value, tuple) else value
    if name in BIASED:
        spec["bias"] = module.bias is not None
    return spec


def build(spec: dict[str, Any], *, device: torch.device | str | None = None) -> nn.Module:
    """An empty layer from its description. Raises ArtifactError for an unknown type or missing arguments.

    >>> build({"type": "Linear", "in_features": 3, "out_features": 2, "bias": False}, device="meta").weight.shape
    torch.Size([2, 3])
    """
    kind = spec.get("type")
    if kind not in PLAIN and kind not in COMPRESSED:
        raise ArtifactError(f"a saved model has a layer of {nearest('type', kind, [*PLAIN, *COMPRESSED])}")
    try:
        if kind in COMPRESSED:
            layer: nn.Module = COMPRESSED[kind].from_spec(spec, device=device)
            return layer
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "type"}
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            return PLAIN[kind][0](**arguments)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"a saved model describes a layer of type {kind!r} wrongly ({error!r}): {spec}.") from error
