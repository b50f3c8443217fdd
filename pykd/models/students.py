"""Students made out of their teacher: its most important weights in a smaller network, not random ones."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

from torch import Tensor, nn

from pykd.nn.channels import default_example, remove_channels
from pykd.nn.family_config import keep_layer_types, update_config
from pykd.nn.slicing import (
    attention_blocks,
    feed_forward_blocks,
    head_scores,
    keep_heads,
    keep_neurons,
    kept_count,
    neuron_scores,
    strongest,
)

Model = TypeVar("Model", bound=nn.Module)

#: Names under which modules and configs count their layers.
LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def derive(
    teacher: Model,
    *,
    width: float = 1.0,
    depth: int | None = None,
    num_classes: int | None = None,
    example: Tensor | dict[str, Tensor] | None = None,
) -> Model:
    """A smaller copy of ``teacher`` made of its most important weights; the teacher is not touched.

    width: share (0..1] of units kept, by L2 norm: channels of a convolutional network; attention heads and
    feed-forward neurons of a transformer (the residual stream keeps its width). depth: number of transformer layers
    kept, evenly spaced, the first and the last among them (DistilBERT, Sanh et al. 2019); ``student.pykd_layer_map``
    names, for each stack, the teacher layer that each student layer came from. num_classes: gives the student a new,
    randomly initialised classifier. example: a batch the model accepts, to trace a convolutional network
    (default: one 64-pixel image).

    Raises ValueError for a width or depth that leaves nothing or asks for more than there is.

    >>> import torch
    >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> derive(teacher, width=0.5)[0].out_channels
    4
    """
    if not 0 < width <= 1:
        raise ValueError(f"width is the share of units kept, above 0 and at most 1, got {width!r}")
    student = copy.deepcopy(teacher)
    student.__dict__.pop("pykd_report", None)
    stacks = layer_stacks(student)
    student.__dict__["pykd_layer_map"] = {name: list(range(len(stack))) for name, stack in stacks.items()}
    if depth is not None:
        student.__dict__["pykd_layer_map"] = _keep_layers(student, stacks, depth)
    if width < 1:
        _narrow(student, width, example)
    if num_classes is not None:
        _new_classifier(student, num_classes)
    return student


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


def spaced_layers(layers: int, depth: int) -> list[int]:
    """Indices of ``depth`` of ``layers`` layers, evenly spaced, the first and the last among them.

    >>> spaced_layers(12, 4)
    [0, 4, 7, 11]
    """
    return [0] if depth == 1 else [round(i * (layers - 1) / (depth - 1)) for i in range(depth)]


def _keep_layers(student: nn.Module, stacks: dict[str, nn.ModuleList], depth: int) -> dict[str, list[int]]:
    if not stacks:
        raise ValueError(
            f"depth={depth} needs a transformer; {type(student).__name__} has no stack of equal layers: use width"
        )
    layer_map: dict[str, list[int]] = {}
    for name, stack in stacks.items():
        layers = len(stack)
        if not 1 <= depth <= layers:
            raise ValueError(f"depth must be between 1 and the teacher's {layers} layers in {name}, got {depth}")
        kept = spaced_layers(layers, depth)
        stack._modules = {str(new): stack[old] for new, old in enumerate(kept)}
        for new, layer in enumerate(stack):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.__dict__["layer_idx"] = new
        layer_map[name] = kept
        _set_counts(student.get_submodule(name.rpartition(".")[0]), layers, depth)
        config = getattr(student, "config", None)
        if config is not None:
            _set_counts(config, layers, depth)
            keep_layer_types(config, kept)
    return layer_map


def _set_counts(owner: object, old: int, new: int) -> None:
    for name in LAYER_COUNTS:
        if getattr(owner, name, None) == old:
            setattr(owner, name, new)


def _narrow(student: nn.Module, width: float, example: Tensor | dict[str, Tensor] | None) -> None:
    heads, neurons = attention_blocks(student), feed_forward_blocks(student)
    if not heads and not neurons:
        if not any(isinstance(module, nn.Conv2d) for module in student.modules()):
            raise ValueError(
                f"{type(student).__name__} has neither attention, feed-forward blocks nor convolutions that pykd knows "
                "how to narrow: use depth, or build the student yourself"
            )
        remove_channels(student, default_example(student) if example is None else example, 1 - width)
        return
    for block in heads:
        keep_heads(block, strongest(head_scores(block), kept_count(block.units, 1 - width)))
    for feed_forward in neurons:
        keep_neurons(feed_forward, strongest(neuron_scores(feed_forward), kept_count(feed_forward.units, 1 - width)))
    update_config(student)


def _new_classifier(student: nn.Module, num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    linears = [(name, module) for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(student).__name__} has no linear classifier to replace: leave num_classes out")
    name, old = linears[-1]
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    nn.init.normal_(new.weight, std=1 / math.sqrt(old.in_features))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(student.get_submodule(parent), leaf, new.to(device=old.weight.device, dtype=old.weight.dtype))
    attributes: dict[str, Any] = student.__dict__
    if "config" in attributes:
        attributes["config"].num_labels = num_classes
    if "num_labels" in attributes:
        attributes["num_labels"] = num_classes
    if "pykd_origin" in attributes:
        source = attributes["pykd_origin"]
        attributes["pykd_origin"] = {**source, "kwargs": {**source.get("kwargs", {}), "num_classes": num_classes}}
