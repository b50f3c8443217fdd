"""What a Hugging Face config says after the network was cut: shapes it can express are corrected, others stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from pykd.nn.bound_heads import bound_blocks
from pykd.nn.slicing import attention_blocks, feed_forward_blocks

#: Names under which configs keep the width of every feed-forward block; the first that exists is meant.
NEURONS = ("intermediate_size", "hidden_dim", "d_ff", "n_inner")


def update_config(model: nn.Module) -> None:
    """Set head counts and feed-forward width in ``model.config`` when all blocks agree and the config can say it.

    A uniform change can then be rebuilt from the config alone. BERT, for instance, derives the width of a head from
    ``hidden_size / num_attention_heads``: fewer heads of the old width cannot be said there, and it is left alone.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    neurons = {block.units for block in feed_forward_blocks(model)}
    name = next((name for name in NEURONS if isinstance(getattr(config, name, None), int)), None)
    if len(neurons) == 1 and name is not None:
        setattr(config, name, neurons.pop())
    shapes = {(block.heads, block.units, block.head_size) for block in (*attention_blocks(model), *bound_blocks(model))}
    if len(shapes) == 1:
        _set_if_valid(config, _head_changes(config, *shapes.pop()))


def widest_config(model: nn.Module) -> Any:
    """A copy of ``model.config`` whose feed-forward width is that of the model's widest block."""
    config = copy.deepcopy(model.config)
    name = next((name for name in NEURONS if isinstance(getattr(config, name, None), int)), None)
    neurons = [block.units for block in feed_forward_blocks(model)]
    if neurons and name is not None:
        setattr(config, name, max(neurons))
    return config


def keep_layer_types(config: Any, kept: Sequence[int]) -> None:
    """Slice the per-layer list that some decoders keep (``layer_types``), count DeepSeek's dense layers again."""
    dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(dense, int):
        config.first_k_dense_replace = sum(index < dense for index in kept)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and kinds:
        config.layer_types = [kinds[index] for index in kept]


def _head_changes(config: Any, heads: int, units: int, head_size: int) -> dict[str, int]:
    changes = {"num_attention_heads": heads}
    if hasattr(config, "num_key_value_heads"):
        changes["num_key_value_heads"] = units
    if isinstance(getattr(config, "head_dim", None), int):
        changes["head_dim"] = head_size
    elif heads * head_size != getattr(config, "hidden_size", None):
        return {}
    return changes


def _set_if_valid(config: Any, changes: dict[str, int]) -> None:
    """Apply the changes when the config class still accepts itself with them (some want hidden_size % heads == 0)."""
    trial = copy.deepcopy(config)
    try:
        for name, value in changes.items():
            setattr(trial, name, value)
        type(config).from_dict(trial.to_dict())
    except Exception:  # each config class, and huggingface_hub's validator, raises its own type
        return
    for name, value in changes.items():
        setattr(config, name, value)
