"""Layers of a transformer as a list: which there are, keeping some of them, and where each came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pykd.nn.family_config import keep_layer_types
from pykd.nn.slicing import attention_blocks, feed_forward_blocks

#: Names under which modules and configs count their layers.
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
#: Of these, the ones that count a decoder where there is an encoder too.
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")

LayerMap = dict[str, list[int]]


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The transformer's layers, one list per stack (encoder, decoder), by name.

    They are the outermost lists of layers of one class that hold attention or feed-forward blocks, or that are as long
    as the config says the network is deep.
    """
    owners = [block.name for block in attention_blocks(model)] + [block.name for block in feed_forward_blocks(model)]
    config = getattr(model, "config", None)
    depths = {getattr(config, name, None) for name in LAYER_COUNTS}
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in stacks):
            continue
        known = len(module) in depths or any(owner.startswith(f"{name}.") for owner in owners)
        if known and len({type(layer) for layer in module}) == 1:
            stacks[name] = module
    return stacks


def layer_map(model: nn.Module) -> LayerMap:
    """For each stack the number of the original layer that each layer came from; 0, 1, 2 ... where none was removed.

    The original is the model that the first student of a line was cut from: students of students name its layers too.
    The map is saved with the model (``config.pykd_layer_map``). Stacks that go on where the one before ends, as those
    of a router, are counted on.

    >>> layer_map(nn.Linear(2, 2))
    {}
    """
    known: LayerMap = getattr(getattr(model, "config", None), "pykd_layer_map", None) or model.__dict__.get(
        "pykd_layer_map", {}
    )
    found, first = {}, 0
    for name, stack in layer_stacks(model).items():
        mapped = known.get(name, [])
        found[name] = list(mapped) if len(mapped) == len(stack) else list(range(first, first + len(stack)))
        first = found[name][-1] + 1 if _one_stream(model) else 0
    return found


def keep_layers(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Keep only these layers of each stack, in place, with the config's counts and the record of where they came from.

    Raises ValueError for a stack or a layer that does not exist, an order that is not ascending, and an empty list.

    >>> from pykd.models.huggingface import load_huggingface
    >>> tiny = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 4,
    ...         "num_attention_heads": 2, "intermediate_size": 8}
    >>> model = load_huggingface(None, "masked-lm", config=tiny)
    >>> keep_layers(model, {"bert.encoder.layer": [0, 3]})
    >>> model.config.num_hidden_layers, layer_map(model)
    (2, {'bert.encoder.layer': [0, 3]})
    """
    stacks, known = layer_stacks(model), layer_map(model)
    for name, chosen in kept.items():
        if name not in stacks:
            raise ValueError(f"{type(model).__name__} has no stack of layers {name!r}, only {', '.join(stacks) or '-'}")
        layers, ascending = len(stacks[name]), sorted(set(chosen)) == list(chosen)
        if not chosen or not ascending or chosen[0] < 0 or chosen[-1] >= layers:
            raise ValueError(f"layers of {name} are some of 0..{layers - 1} in ascending order, got {list(chosen)}")
    for name, chosen in kept.items():
        layers = len(stacks[name])
        _cut(stacks[name], chosen)
        known[name] = [known[name][index] for index in chosen]
        counts: Sequence[str] = LAYER_COUNTS
        if len(stacks) > 1:
            decodes = "decoder" in name
            counts = tuple(count for count in LAYER_COUNTS if (count in DECODER_COUNTS) == decodes)
        _set_counts(model.get_submodule(name.rpartition(".")[0]), LAYER_COUNTS, layers, len(chosen))
        config = getattr(model, "config", None)
        if config is not None:
            _set_counts(config, counts, layers, len(chosen))
            keep_layer_types(config, chosen)
    remember(model, known)


def remember(model: nn.Module, known: LayerMap) -> None:
    """Note the map on the model, and in its config, which is saved."""
    model.__dict__["pykd_layer_map"] = known
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config.pykd_layer_map = known


def _cut(stack: nn.ModuleList, kept: Sequence[int]) -> None:
    first = stack[0]
    stack._modules = {str(new): stack[old] for new, old in enumerate(kept)}
    if stack[0] is not first:
        _take_position_bias(stack[0], first)
    for new, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.__dict__["layer_idx"] = new


def _take_position_bias(layer: nn.Module, first: nn.Module) -> None:
    """T5 keeps the position biases of all layers in the first one: the new first layer takes them over."""
    for name, module in first.named_modules():
        if getattr(module, "has_relative_attention_bias", False) is True:
            heir: Any = layer.get_submodule(name)
            heir.relative_attention_bias = module.relative_attention_bias
            heir.has_relative_attention_bias = True


def _set_counts(owner: object, names: Sequence[str], old: int, new: int) -> None:
    for name in names:
        if getattr(owner, name, None) == old:
            setattr(owner, name, new)


def match_layers(student: nn.Module, teacher: nn.Module) -> list[list[int]]:
    """For each stack, the teacher's layer that each student layer should follow, by number.

    A student that was cut from this teacher, or from the same original, follows the layer that it came from, or the
    nearest that the teacher still has. Others follow evenly, the last layer the last one (TinyBERT, Jiao et al. 2020,
    section 4.1). The stacks of a router, one behind the other, count as one. Raises ValueError for models with
    different numbers of stacks.

    >>> match_layers(nn.Linear(2, 2), nn.Linear(2, 2))
    []
    """
    mine, its = _streams(student), _streams(teacher)
    if len(mine) != len(its):
        raise ValueError(
            f"{type(student).__name__} has {len(mine)} stacks of layers, {type(teacher).__name__} {len(its)}: "
            "layers can be matched between models of one kind only"
        )
    matched = []
    for own, other in zip(mine, its, strict=True):
        if _was_cut(student) and own[-1] <= other[-1]:
            matched.append([_nearest(layer, other) for layer in own])
        else:
            matched.append([-(-(index + 1) * len(other) // len(own)) - 1 for index in range(len(own))])
    return matched


def _one_stream(model: nn.Module) -> bool:
    """Whether a model's stacks run one behind the other on the same states: a router's, not encoder and decoder."""
    return bool(getattr(model, "one_stream", False))


def _streams(model: nn.Module) -> list[list[int]]:
    """The layers of each stack by their original numbers; stacks of one stream put together."""
    maps = list(layer_map(model).values())
    return [[layer for numbers in maps for layer in numbers]] if _one_stream(model) else maps


def _nearest(layer: int, layers: Sequence[int]) -> int:
    """Where in a list the number nearest to one is; the first of two equally near ones."""
    return min(range(len(layers)), key=lambda at: abs(layers[at] - layer))


def _was_cut(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "pykd_layer_map", None) or "pykd_layer_map" in vars(model))
