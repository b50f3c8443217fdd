"""Students made out of their teacher: its most important weights in a smaller network, not random ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from pykd.models.layer_choice import Batches, choose_layers
from pykd.models.layers import keep_layers, layer_map, layer_stacks, remember
from pykd.models.narrow import narrowed
from pykd.models.sizes import HEADS, NEURONS, PRESETS, has_fixed_heads, resized_config, size_of, value_of
from pykd.nn.channels import default_example, remove_channels
from pykd.nn.family_config import update_config
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


def derive(
    teacher: Model,
    *,
    preset: str | None = None,
    width: float = 1.0,
    depth: int | None = None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]] = "spaced",
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    num_classes: int | None = None,
    example: Tensor | dict[str, Tensor] | None = None,
    batches: Batches | None = None,
) -> Model:
    """A smaller copy of ``teacher`` made of its most important weights; the teacher is not touched.

    width: share (0..1] of units kept, by L2 norm: channels of a convolutional network; attention heads and
    feed-forward neurons of a transformer (the residual stream keeps its width).

    depth: number of transformer layers kept. layers: which, "spaced" evenly with the first and the last among them
    (DistilBERT, Sanh et al. 2019), "first", "last", by data "influence" (ShortGPT, Men et al. 2024) or "divergence"
    of the outputs without the layer; or their indices, for all stacks or by stack, which needs no depth.
    ``layer_map(student)`` names the teacher layer that each student layer came from; it is saved with the student.

    hidden_size, heads, intermediate_size: width of the residual stream, query heads, neurons of a transformer (see
    :func:`pykd.models.narrow.narrowed`); a head count that does not fit the width is lowered to one that does, which is
    logged and recorded. preset: a published size as "6x512" (layers x width), see ``PRESETS``; it sets all four (heads
    and neurons at most the teacher's).

    num_classes: gives the student a new, randomly initialised classifier. example: a batch the model accepts, to trace
    a convolutional network (default: one 64-pixel image). batches: dicts of inputs and labels, the data that
    "influence", "divergence" and the choice of channels are measured on. The student's ``pykd_report`` begins with what
    was done.

    Raises ValueError for a size that leaves nothing or asks for more than there is, and for options that exclude each
    other.

    >>> import torch
    >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    >>> derive(teacher, width=0.5)[0].out_channels
    4
    """
    if not 0 < width <= 1:
        raise ValueError(f"width is the share of units kept, above 0 and at most 1, got {width!r}")
    if preset is not None:
        if any(value is not None for value in (depth, hidden_size, heads, intermediate_size)) or width < 1:
            raise ValueError(f"preset {preset!r} says every size: leave width, depth, hidden_size, heads and "
                             "intermediate_size out")  # fmt: skip
        config = getattr(teacher, "config", teacher)
        its_heads = value_of(config, HEADS) or 12
        size = size_of(preset, heads=its_heads)
        neurons = min(size.intermediate_size, value_of(config, NEURONS) or size.intermediate_size)
        depth, hidden_size, heads, intermediate_size = size.depth, size.hidden_size, min(size.heads, its_heads), neurons
        heads = None if has_fixed_heads(config) or preset not in PRESETS else heads  # None: its own, as far as they fit
    named = not isinstance(layers, str)
    if named and depth is not None:
        raise ValueError("layers names the layers kept: leave depth out")
    student = copy.deepcopy(teacher)
    remember(student, layer_map(student))
    if named or depth is not None:
        keep_layers(student, _kept(student, depth, layers, batches))
    notes: list[str] = []
    if hidden_size is not None or heads is not None or intermediate_size is not None:
        student, notes = _resize(student, hidden_size, heads, intermediate_size, batches)
    if width < 1:
        _narrow(student, width, example)
    if num_classes is not None:
        _new_classifier(student, num_classes)
    options = {"preset": preset, "width": width, "depth": depth, "hidden_size": hidden_size, "heads": heads,
               "intermediate_size": intermediate_size, "num_classes": num_classes}  # fmt: skip
    _record(student, teacher, layers if isinstance(layers, str) else "named", options, notes)
    return student


def _kept(
    student: nn.Module,
    depth: int | None,
    layers: str | Sequence[int] | Mapping[str, Sequence[int]],
    batches: Batches | None,
) -> Mapping[str, Sequence[int]]:
    if isinstance(layers, Mapping):
        return layers
    if isinstance(layers, str):
        assert depth is not None
        return choose_layers(student, depth, layers, batches=batches)
    stacks = layer_stacks(student)
    if not stacks:
        raise ValueError(
            f"layers needs a transformer; {type(student).__name__} has no stack of equal layers: use width"
        )
    return {name: list(layers) for name in stacks}


def _resize(
    student: Model, hidden_size: int | None, heads: int | None, neurons: int | None, batches: Batches | None
) -> tuple[Model, list[str]]:
    config = getattr(student, "config", None)
    if not hasattr(config, "to_dict"):
        raise ValueError(
            f"hidden_size, heads and intermediate_size need a Hugging Face transformer, got {type(student).__name__}: "
            "use width"
        )
    smaller, notes = resized_config(config, hidden_size=hidden_size, heads=heads, intermediate_size=neurons)
    made: Any = narrowed(student, smaller, batches=batches)
    remember(made, layer_map(student))
    return made, notes


def _record(
    student: nn.Module, teacher: nn.Module, layers: str, options: Mapping[str, Any], notes: Sequence[str]
) -> None:
    entry = {
        "stage": "derive",
        "method": layers,
        "parameters": {name: value for name, value in options.items() if value is not None},
        "teacher": type(teacher).__name__,
        "layer_map": layer_map(student),
        "parameters_before": sum(p.numel() for p in teacher.parameters()),
        "parameters_after": sum(p.numel() for p in student.parameters()),
        "notes": list(notes),
    }
    student.__dict__["pykd_report"] = [entry]


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
