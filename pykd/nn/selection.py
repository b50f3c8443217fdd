"""Which layers a verb may touch: by type, by name patterns, and never those whose weight something else reads."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear

#: Layers with a weight matrix that pruning and quantization can replace, dense or already sparse.
LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, SparseLinear)
CONVOLUTION: tuple[type[nn.Module], ...] = (nn.Conv2d, SparseConv2d)
#: Layers whose rows are looked up; an output projection may share their weight.
EMBEDDING: tuple[type[nn.Module], ...] = (nn.Embedding,)


def transposed() -> tuple[type[nn.Module], ...]:
    """GPT-2's linear layers, whose weight is [in_features, out_features]; none while transformers is not loaded."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module is not None else ()


def as_linear(layer: nn.Module) -> nn.Module:
    """A transposed linear layer as nn.Linear with the same numbers; any other layer as it is.

    >>> as_linear(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(layer, transposed()):
        return layer
    weight: Any = layer.weight
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)


@dataclass
class Selection:
    """Layers to work on by name, and why others were left out."""

    chosen: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def select_layers(
    model: nn.Module,
    kinds: Collection[type[nn.Module]],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Selection:
    """Layers of exactly these classes whose names the patterns admit.

    include: shell patterns of the names of layers, or of modules that contain layers; None takes every layer but the
    output heads. exclude: patterns that always win. A layer stays out, and is named with the reason, when its weight is
    shared with another module, when nn.MultiheadAttention reads it directly, or when it is the model itself. An
    embedding may share its weight with linear layers and other embeddings, unless one of them is excluded.
    Raises ValueError for a pattern that matches no layer, and when nothing is left.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> select_layers(model, LINEAR)
    Selection(chosen={'0': Linear(in_features=4, out_features=4, bias=True)}, skipped={'2': 'output head'})
    """
    layers = layers_of(model, kinds)
    for pattern in (*(include or ()), *(exclude or ())):
        _require_match(pattern, layers)
    heads, unsafe = output_heads(model), _unsafe(model, layers, kinds)
    selection = Selection()
    for name, module in layers.items():
        excluding = next((pattern for pattern in exclude or () if matches(name, pattern)), None)
        if include is not None and not any(matches(name, pattern) for pattern in include):
            continue
        if excluding is not None:
            selection.skipped[name] = f"excluded by {excluding!r}"
        elif name in unsafe:
            selection.skipped[name] = unsafe[name]
        elif include is None and module in heads:
            selection.skipped[name] = "output head"
        else:
            selection.chosen[name] = module
    for name in [name for name, module in selection.chosen.items() if isinstance(module, nn.Embedding)]:
        barred = [other for other in sharing(model, name) if selection.skipped.get(other, "").startswith("excluded")]
        if barred:
            selection.skipped[name] = f"shares its weight with {barred[0]!r}, which is excluded"
            del selection.chosen[name]
    if not selection.chosen:
        kind = " or ".join(sorted(cls.__name__ for cls in kinds))
        left_out = "; ".join(f"{name}: {why}" for name, why in list(selection.skipped.items())[:3])
        raise ValueError(f"no {kind} layer of {type(model).__name__} is left to work on ({left_out or 'it has none'})")
    return selection


def layers_of(model: nn.Module, kinds: Collection[type[nn.Module]]) -> dict[str, nn.Module]:
    """The model's modules of these classes and their subclasses, by name, in module order."""
    return {name: module for name, module in model.named_modules() if any(isinstance(module, kind) for kind in kinds)}


def uncovered(
    model: nn.Module, kinds: Collection[type[nn.Module]], least_bytes: int = 0, *, form: str = "packed"
) -> dict[str, str]:
    """Modules of no class in `kinds` that hold more than `least_bytes` of weights themselves, and why they stay.

    Weights are parameters of two dimensions or more. form: what there is none of, in the sentence.

    >>> uncovered(nn.Sequential(nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4)), LINEAR)
    {'0': 'no packed form of Conv1d'}
    """
    found = {}
    for name, module in model.named_modules():
        size = sum(parameter.nbytes for parameter in module.parameters(recurse=False) if parameter.dim() > 1)
        if size > least_bytes and not isinstance(module, tuple(kinds)):
            found[name] = f"no {form} form of {type(module).__name__}"
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits the name of a layer, or of a module that it lies in.

    >>> matches("encoder.layer.0.dense", "encoder.layer.?"), matches("encoder.layer.10.dense", "encoder.layer.1")
    (True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Layers that make the model's outputs: what a Hugging Face model has beside its base, else the last linear layer
    (the last convolution of a network without linear layers)."""
    base = getattr(model, "base_model", None)
    heads: set[nn.Module] = set()
    if isinstance(base, nn.Module):
        inside = set(base.modules())
        if base is not model:
            heads = {module for module in model.modules() if module not in inside}
        find: Any = getattr(model, "get_output_embeddings", None)
        embeddings = find() if find is not None else None
        return heads | ({embeddings} if isinstance(embeddings, nn.Module) else set())
    for kind in (LINEAR, CONVOLUTION):
        found = [module for module in model.modules() if isinstance(module, kind)]
        if found:
            return {found[-1]}
    return heads


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever the model holds ``old``, under every name it has."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def sharing(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The other modules, by name, that hold the very weight of this layer.

    >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
    >>> model[1].weight = model[0].weight
    >>> sharing(model, "0")
    {'1': Linear(in_features=2, out_features=4, bias=True)}
    """
    names = {module: other for other, module in model.named_modules()}
    layer = model.get_submodule(name)
    return {names[owner]: owner for owner in _owners(names)[id(layer.weight)] if owner is not layer}


def _owners(modules: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    """id of a parameter -> the modules that hold it."""
    owners: dict[int, list[nn.Module]] = {}
    for module in modules:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _unsafe(model: nn.Module, layers: dict[str, nn.Module], kinds: Collection[type[nn.Module]]) -> dict[str, str]:
    names = {module: name for name, module in model.named_modules()}
    owners = _owners(names)
    read = {child for module in names if isinstance(module, nn.MultiheadAttention) for child in module.children()}
    reasons: dict[str, str] = {}
    for name, module in layers.items():
        others = [o for p in module.parameters(recurse=False) for o in owners[id(p)] if o is not module]
        if type(module) is nn.Embedding:
            others = [other for other in others if type(other) not in (nn.Linear, nn.Embedding)]
        if name == "":
            reasons[name] = "is the model itself, which cannot be replaced in place"
        elif module in read:
            reasons[name] = "nn.MultiheadAttention reads its weight directly"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            reasons[name] = "rescales its rows in each lookup (max_norm)"
        elif others:
            reasons[name] = f"shares its weight with {names[others[0]]!r}"
        elif type(module) not in kinds:
            reasons[name] = f"is a {type(module).__name__}, which may compute something else"
    return reasons


def _require_match(pattern: str, layers: dict[str, nn.Module]) -> None:
    if any(matches(name, pattern) for name in layers):
        return
    near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.4) or list(layers)[:3]
    raise ValueError(f"pattern {pattern!r} matches no layer; layers are named like {', '.join(map(repr, near)) or '-'}")
