"""What the layers of encoder families consist of, whatever their classes call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Parts(NamedTuple):
    """What a post-norm encoder layer (Vaswani et al. 2017, as in BERT) consists of, whatever its family calls it."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    heads: int
    scale: float
    mix: nn.Module
    first_norm: nn.LayerNorm
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    second_norm: nn.LayerNorm
    #: Modules between those, which are not called: who hooks one of them wants them to be.
    between: tuple[nn.Module, ...]


def _bert(layer: Any) -> Parts:
    attention, look = layer.attention, layer.attention.self
    output, up, down = attention.output, layer.intermediate, layer.output
    return Parts(
        look.query, look.key, look.value, look.num_attention_heads, look.attention_head_size**-0.5,
        output.dense, output.LayerNorm, up.dense, up.intermediate_act_fn, down.dense, down.LayerNorm,
        (attention, look, output, up, down),
    )  # fmt: skip


def _distilbert(layer: Any) -> Parts:
    look, feed = layer.attention, layer.ffn
    heads = look.n_heads
    return Parts(
        look.q_lin, look.k_lin, look.v_lin, heads, look.attention_head_size**-0.5, look.out_lin, layer.sa_layer_norm,
        feed.lin1, feed.activation, feed.lin2, layer.output_layer_norm, (look, feed),
    )  # fmt: skip


#: Class of a transformers layer -> its parts.
FAMILIES: dict[str, Callable[[Any], Parts]] = {
    **dict.fromkeys(("BertLayer", "RobertaLayer", "CamembertLayer", "XLMRobertaLayer", "ElectraLayer"), _bert),
    "TransformerBlock": _distilbert,
}

#: Class of an activation -> the name that packed linear layers know it by.
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "SiLU": "silu",
}
