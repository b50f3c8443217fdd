"""How a compressed model differs from the one its configuration describes, as JSON, and that difference applied.

A configuration says "12 heads, 3072 neurons"; after pruning and quantization single layers have other widths and other
classes. What is stored is the difference to a fresh skeleton built from the configuration: the layers whose class or
shape is another one, the integers on containers that a forward pass computes with (`num_attention_heads` ...), and
what is absent. Applied to such a skeleton, also on the meta device, it yields the compressed model without its values.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError, nearest
from pykd.io.layers import PLAIN, build, describe
from pykd.nn import COMPRESSED
from pykd.nn.embedding import CompressedEmbedding
from pykd.nn.tied import Tied


@dataclass(frozen=True)
class Structure:
    """A difference to a skeleton. Names are those of `named_modules()` and `state_dict()`.

    Attributes:
        modules: layer -> its description (`describe`), where class or shape differs.
        attributes: module -> {attribute: int or list of ints} where they differ on modules that stay what they are.
        shapes: parameter or buffer -> shape, where it differs on modules that stay what they are.
        removed: modules that the skeleton has and the model has not.
        tied: name in `state_dict()` -> the name under which the same tensor is stored.
        sources: layer without a weight of its own (`pykd.nn.tied`) -> the embedding whose weight it uses.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; all but `modules` and `attributes` are left out when empty."""
        content = asdict(self)
        return {k: copy.deepcopy(v) for k, v in content.items() if v or k in ("modules", "attributes")}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Structure:
        """From the JSON form. Raises ArtifactError for a key that this format does not have."""
        known = [item.name for item in fields(cls)]
        for key in content:
            if key not in known:
                raise ArtifactError(f"the description of a saved model has an {nearest('key', key, known)}")
        return cls(**copy.deepcopy(content))

    def changes(self) -> bool:
        """Whether the model is anything but its skeleton (ties that the skeleton makes itself do not count)."""
        return bool(self.modules or self.attributes or self.shapes or self.removed)


def difference(model: nn.Module, skeleton: nn.Module) -> Structure:
    """What turns `skeleton` into the structure of `model` (values aside; `tied` is left empty).

    Raises ArtifactError for a module that cannot be described: of a class that neither the skeleton nor pykd has.
    """
    ours = dict(model.named_modules(remove_duplicate=False))
    theirs = dict(skeleton.named_modules(remove_duplicate=False))
    found = Structure()
    for name, module in ours.items():
        if _inside(name, found.modules):
            continue
        other = theirs.get(name)
        spec = describe(module)
        if spec is not None:
            if other is None or spec != describe(other):
                found.modules[name] = spec
            if isinstance(module, Tied):
                found.sources[name] = _name_of(module.source, name, ours)
        elif other is None or type(module) is not type(other):
            wanted = "nothing" if other is None else type(other).__name__
            raise ArtifactError(
                f"module {name!r} is a {type(module).__name__}, where the model's configuration has {wanted}; only "
                f"{', '.join([*PLAIN, *COMPRESSED])} can be saved there. Undo wrappers and parametrizations first."
            )
        else:
            _compare(name, module, other, found)
    for name in theirs:
        if name not in ours and not _inside(name, found.modules) and not _inside(name, found.removed):
            found.removed.append(name)
    return found


def apply(model: nn.Module, structure: Structure) -> None:
    """Give `model` the structure that `difference` found, in place and on its own device (so also on "meta").

    New layers are empty: their values are loaded afterwards. Raises ArtifactError if a name does not exist.
    """
    made: dict[tuple[int, str], nn.Module] = {}
    for name, spec in structure.modules.items():
        parent, child = _parent(model, name)
        old = parent._modules.get(child)
        key = (id(old), repr(spec))
        if old is None or key not in made:
            made[key] = build(spec, device=_device(old if old is not None else model)).train(parent.training)
        parent.add_module(child, made[key])
    for name in reversed(structure.removed):
        parent, child = _parent(model, name)
        if isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            del parent._modules[child]
        else:
            setattr(parent, child, None)
    for name, values in structure.attributes.items():
        module = _module(model, name)
        for attribute, value in values.items():
            if attribute.startswith("_") or attribute not in vars(module):
                raise ArtifactError(f"the saved attribute {attribute!r} does not exist on module {name!r} there.")
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    for name, shape in structure.shapes.items():
        _reshape(*_parent(model, name), shape)
    for name, target in structure.sources.items():
        layer, source = _module(model, name), _module(model, target)
        if not isinstance(layer, Tied) or not isinstance(source, CompressedEmbedding):
            raise ArtifactError(
                f"the saved model ties {name!r}, a {type(layer).__name__}, to {target!r}, a {type(source).__name__}; "
                "only pykd's tied layers take the weight of another, and only of a compressed embedding."
            )
        layer.tie(source)


def shared(state: dict[str, Tensor], secondary: set[str] | None = None) -> dict[str, str]:
    """Names of one and the same tensor: {name: the name to store it under}, a `secondary` name only if all are.

    >>> weight = torch.ones(2)
    >>> shared({"a": weight, "b": weight, "c": torch.ones(2)}, secondary={"a"})
    {'a': 'b'}
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in state.items():
        if value.numel():
            place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            groups.setdefault(place, []).append(name)
    tied = {}
    for names in groups.values():
        stored = next((name for name in names if name not in (secondary or ())), names[0])
        tied.update({name: stored for name in names if name != stored})
    return tied


def _compare(name: str, module: nn.Module, other: nn.Module, found: Structure) -> None:
    changed = {}
    for attribute, value in vars(module).items():
        if not attribute.startswith("_") and _integral(value) and attribute in vars(other):
            theirs = vars(other)[attribute]
            if value != theirs and (theirs is None or _integral(theirs)):
                changed[attribute] = list(value) if isinstance(value, tuple) else value
    if changed:
        found.attributes[name] = changed
    tensors = dict(_direct(other))
    for key, value in _direct(module):
        if key in tensors and tensors[key].shape != value.shape:
            found.shapes[f"{name}.{key}" if name else key] = list(value.shape)


def _name_of(source: nn.Module, name: str, modules: dict[str, nn.Module]) -> str:
    found = next((other for other, module in modules.items() if module is source), None)
    if found is None:
        raise ArtifactError(
            f"module {name!r} uses the weight of an embedding that is not in the model; put the embedding back, or "
            "replace the module by its to_dense()."
        )
    return found


def _integral(value: object) -> bool:
    return type(value) is int or (isinstance(value, tuple) and bool(value) and all(type(item) is int for item in value))


def _direct(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _inside(name: str, roots: dict[str, Any] | list[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in roots for end in range(1, len(parts)))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the saved model has a module {name!r}, which {type(model).__name__} has not.") from error


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return _module(model, path), child


def _device(module: nn.Module) -> torch.device:
    for tensor in [*module.parameters(), *module.buffers()]:
        return tensor.device
    return torch.get_default_device()


def _reshape(module: nn.Module, name: str, shape: list[int]) -> None:
    old = dict(_direct(module)).get(name)
    if old is None:
        raise ArtifactError(f"the saved model has a tensor {name!r}, which its module {type(module).__name__} has not.")
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
