"""The ordinary form of a compressed model: what its library builds from the configuration alone, dequantized."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io import structure
from pykd.io.layers import build, describe
from pykd.io.structure import Structure
from pykd.models.adapter import FAMILIES, logits, origin, skeleton, unwrap
from pykd.models.example import example_batch
from pykd.nn.compressed import CompressedModule
from pykd.nn.family_config import widest_config
from pykd.nn.tied import Tied

#: The largest difference of logits, as a share of the largest logit, that the order of float32 sums may explain.
ROUNDING = 1e-4


def dense_simulation(model: nn.Module) -> nn.Module:
    """A copy of the model with a `torch.nn` layer of the dequantized weight in the place of every compressed one.

    Shapes stay as they are; pruned weights are zeros; activations are not rounded. Layers that are tied to a compressed
    embedding share its dense weight. Raises ArtifactError for a layer that applies an activation itself.

    >>> from pykd.nn import Linear4bit
    >>> dense_simulation(nn.Sequential(Linear4bit.from_linear(nn.Linear(8, 4))))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    dense = copy.deepcopy(unwrap(model))
    if isinstance(dense, CompressedModule):
        return _to_dense(dense, "the model itself")
    made: dict[nn.Module, nn.Module] = {}
    tied: list[tuple[nn.Module, nn.Module]] = []
    for name, module in list(dense.named_modules(remove_duplicate=False)):
        if isinstance(module, CompressedModule):
            if module not in made:
                made[module] = _to_dense(module, name).train(module.training)
                if isinstance(module, Tied):
                    tied.append((made[module], module.source))
            parent, _, child = name.rpartition(".")
            dense.get_submodule(parent).add_module(child, made[module])
    for layer, source in tied:
        layer.weight = made[source].weight
    return dense


def _to_dense(module: CompressedModule, name: str) -> nn.Module:
    activation = getattr(module, "activation", None)
    if activation is not None:
        raise ArtifactError(
            f"module {name!r} applies {activation!r} itself, which an ordinary layer cannot: put the activation back "
            "behind the layer and pass activation=None."
        )
    return module.to_dense()


def densify(model: nn.Module) -> nn.Module:
    """A copy that loads without pykd: `dense_simulation` in shapes that the model's configuration can express.

    Uniform widths and numbers of layers stay as they are. Where layers have widths of their own the narrow ones are
    filled up with zeros, to the widest of the model if the configuration can say that, else to the width it says. The
    result is compared with the simulation on an example. Raises ArtifactError, naming the layers, where zeros would
    change what the model computes (layers that are gone, norms over pruned channels, concatenated channels), and for
    models of pykd's own families, which nothing else builds.
    """
    kind = type(unwrap(model)).__name__
    if kind in FAMILIES:
        raise ArtifactError(
            f"{kind} is a family of pykd's own, which no other library builds: export it as onnx, or save it in pykd's "
            "own format (format='pykd')."
        )
    dense: Any = dense_simulation(model)
    _one_dtype(dense)
    config = getattr(dense, "config", None)
    if config is not None:
        dense.config = widest_config(dense)
    fresh = skeleton(dense)
    found = structure.difference(dense, fresh)
    if found.changes():
        before = copy.deepcopy(dense)
        _fill_up(dense, fresh, found)
        _compare(before, dense, found)
    _untie(dense)
    return dense  # type: ignore[no-any-return]


def _one_dtype(model: nn.Module) -> None:
    """Every floating-point tensor in the widest type of all: a plain checkpoint has one."""
    dtypes = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    if len(dtypes) > 1:
        model.to(functools.reduce(torch.promote_types, dtypes))


def _fill_up(model: nn.Module, fresh: nn.Module, found: Structure) -> None:
    """Undo a difference to the skeleton: layers and tensors of its shapes, zeros behind the values that there are."""
    if found.removed:
        raise _refusal(model, "lacks", found.removed)
    theirs = dict(fresh.named_modules(remove_duplicate=False))
    for name in found.modules:
        spec = describe(theirs[name]) if name in theirs else None
        if spec is None:
            raise _refusal(model, "has", [name])
        new, old = build(spec, device="cpu"), model.get_submodule(name)
        new.load_state_dict(_padded(model, name, old.state_dict(), new.state_dict()))
        dtype = next((value.dtype for value in old.state_dict().values() if value.is_floating_point()), None)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, new.to(dtype).train(old.training))
    for name in found.shapes:
        path, _, key = name.rpartition(".")
        value = getattr(model.get_submodule(path), key)
        wide = _padded(model, path, {key: value.detach()}, {key: getattr(theirs[path], key)})[key]
        new_value = nn.Parameter(wide, value.requires_grad) if isinstance(value, nn.Parameter) else wide
        setattr(model.get_submodule(path), key, new_value)
    for name, values in found.attributes.items():
        for attribute in values:
            setattr(model.get_submodule(name), attribute, getattr(theirs[name], attribute))


def _padded(model: nn.Module, name: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    padded = {}
    for key, shape in ((key, value.shape) for key, value in wanted.items()):
        value = state.get(key)
        if value is None:
            padded[key] = torch.zeros(shape)
            continue
        if value.dim() != len(shape) or any(a > b for a, b in zip(value.shape, shape, strict=True)):
            raise _refusal(model, "is wider in", [name])
        padded[key] = value.new_zeros(shape)
        padded[key][tuple(slice(0, size) for size in value.shape)] = value
    if state.keys() - padded.keys():
        raise _refusal(model, "has more tensors in", [name])
    return padded


@torch.no_grad()
def _compare(before: nn.Module, after: nn.Module, found: Structure) -> None:
    batch = example_batch(before, rows=2, seed=0)
    dtype = next((p.dtype for p in after.parameters() if p.is_floating_point()), torch.float32)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    want, got = (logits(copy.deepcopy(model).eval(), batch).float() for model in (before, after))
    limit = ROUNDING if dtype == torch.float32 else torch.finfo(dtype).eps * 8
    if not bool((want - got).abs().max() <= limit * want.abs().max()):
        raise _refusal(after, "has pruned shapes in", [*found.modules, *found.shapes])


def _untie(model: nn.Module) -> None:
    """Give tensors that only this model shares a copy of their own, and tell the configuration of ties it lost."""
    state = model.state_dict(keep_vars=True)
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in structure.shared(state, set(declared)):
        if name not in declared:
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, key, nn.Parameter(getattr(module, key).detach().clone()))
    config: Any = getattr(model, "config", None)
    if any(name in state and state[name] is not state.get(source) for name, source in declared.items()):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _refusal(model: nn.Module, what: str, names: list[str]) -> ArtifactError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    told = origin(model)
    kind = told.get("name") if told["source"] == "torchvision" else type(model).__name__
    return ArtifactError(
        f"no ordinary {kind} computes what this model does: it {what} {', '.join(names[:3])}{more}, which its "
        "configuration cannot say and zeros cannot replace; save it in pykd's own format (format='pykd')."
    )
