"""Encoder layers in fewer passes over memory, for answering: attention, sums and activations as native ops."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pykd.models.encoder_layers import ACTIVATIONS, FAMILIES, Parts
from pykd.nn.linear_4bit import Linear4bit
from pykd.nn.linear_8bit import Linear8bit
from pykd.ops.add_norm import add_norm
from pykd.ops.attention import attention
from pykd.ops.dispatch import skips_dispatcher
from pykd.ops.encoder_layer_8bit import Norm, Packed, encoder_layer_8bit

Model = TypeVar("Model", bound=nn.Module)

#: Models whose `encoder.layer` are of those families, with `embeddings` and a `pooler`.
MODELS = ("BertModel", "RobertaModel", "CamembertModel", "XLMRobertaModel")


class FusedForward:
    """`forward` of one encoder layer: in fused steps where nobody needs what lies between, else as its class says.

    The fused steps serve float32 on a CPU in `eval()`, without gradients, masks other than of padding, caches, hooks on
    what is skipped, or compilation. Everything is looked up anew in each call, so that a layer may be pruned or
    quantized later.
    """

    def __init__(self, layer: nn.Module, masks: _Masks) -> None:
        self.layer, self.masks = layer, masks

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, **options: Any) -> Any:
        layer = self.layer
        parts = FAMILIES[type(layer).__name__](layer)
        plain = not layer.training and hidden_states.dim() == 3 and hidden_states.dtype == torch.float32
        if plain and skips_dispatcher(hidden_states, None) and not torch.is_grad_enabled():
            asked = any(each is not None and each is not False for each in (*rest, *options.values()))
            if not asked and not any(_watched(module) for module in parts.between):
                fits, bias = self.masks.bias_of(attention_mask, hidden_states)
                if fits:
                    return _run(parts, hidden_states, bias)
        return type(layer).forward(layer, hidden_states, attention_mask, *rest, **options)


class FusedModel:
    """`forward` of a model without a head: embeddings, layers and pooler, where only token numbers and masks are given.

    What it leaves out is what transformers does around them for other uses: masks for each query, defaults, captured
    outputs. For short texts that takes as long as a layer.
    """

    def __init__(self, model: nn.Module, masks: _Masks) -> None:
        self.model, self.masks = model, masks

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        model: Any = self.model
        wanted = (value for name, value in options.items() if (name, value) != ("return_dict", True))
        asked = any(value is not None for value in (*rest, *wanted))
        if asked or input_ids is None or not self._is_plain(input_ids, attention_mask):
            given = input_ids, attention_mask, token_type_ids, position_ids, *rest
            return type(model).forward(model, *given, **options)
        states = model.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        mask = None if attention_mask is None else self.masks.of_keys(attention_mask)
        for layer in model.encoder.layer:
            states = layer(states, mask)
        pooled = None if model.pooler is None else model.pooler(states)
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

        return Output(last_hidden_state=states, pooler_output=pooled)

    def _is_plain(self, input_ids: Tensor, mask: Tensor | None) -> bool:
        """Whether nothing is wanted but states, by masks of padding at most."""
        model: Any = self.model
        config = model.config
        listens = config.output_hidden_states or config.output_attentions or not config.return_dict
        masked = mask is None or (mask.shape == input_ids.shape and mask.is_cpu)
        answers = not (model.training or torch.is_grad_enabled()) and skips_dispatcher(input_ids, None)
        ours = config._attn_implementation == "sdpa" and not _watched(model.encoder)
        return answers and masked and ours and not listens


class _Masks:
    """The newest mask and what is added to the scores of each key: all layers of a model are given the same."""

    def __init__(self) -> None:
        self.newest: tuple[Tensor | None, tuple[bool, Tensor | None]] = (None, (True, None))

    def bias_of(self, mask: Tensor | None, states: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the mask only hides keys, the same for every query and head; and the bias [batch, length]."""
        known, found = self.newest
        if mask is known:
            return found
        found = _bias_of(mask, states) if mask is not None else (True, None)
        self.newest = (mask, found)
        return found

    def of_keys(self, mask: Tensor) -> Tensor:
        """[batch, length], other than 0 where a token may be looked at -> the mask of a layer [batch, 1, 1, length]."""
        keys = mask != 0
        whole = keys[:, None, None]
        self.newest = (whole, (True, torch.zeros(mask.shape).masked_fill_(~keys, -torch.inf)))
        return whole


def _bias_of(mask: Tensor, states: Tensor) -> tuple[bool, Tensor | None]:
    batch, length, _ = states.shape
    fits = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch) and mask.shape[3] == length
    if not fits or not mask.is_cpu or not bool((mask == mask[:, :, :1]).all()):
        return False, None
    keys = mask[:, 0, 0].expand(batch, length)
    if mask.dtype == torch.bool:
        return True, torch.zeros(batch, length).masked_fill_(~keys, -torch.inf)
    return mask.is_floating_point(), keys.float()


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _run(parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor:
    name = ACTIVATIONS.get(type(parts.activation).__name__)
    norms = _norm(parts.first_norm), _norm(parts.second_norm)
    linears = _packed(parts, name) if name is not None and x.is_contiguous() else None
    if linears is not None:
        return encoder_layer_8bit(x, linears, norms, heads=parts.heads, scale=parts.scale, bias=bias)
    mixed = attention(parts.query(x), parts.key(x), parts.value(x), heads=parts.heads, scale=parts.scale, bias=bias)
    x = add_norm(parts.mix(mixed), x, *norms[0])
    if name is not None and isinstance(parts.up, (Linear8bit, Linear4bit)) and parts.up.activation is None:
        neurons = parts.up(x, name)
    else:
        neurons = parts.activation(parts.up(x))
    return add_norm(parts.down(neurons), x, *norms[1])


def _packed(parts: Parts, activation: str) -> tuple[Packed, ...] | None:
    """The six linear layers, if all of them are packed w8a8 and nobody watches one."""
    layers = (parts.query, parts.key, parts.value, parts.mix, parts.up, parts.down)
    found = []
    for layer in layers:
        if type(layer) is not Linear8bit or _watched(layer):
            return None
        packed = layer.as_packed(activation if layer is parts.up else None)
        if packed is None:
            return None
        found.append(packed)
    return tuple(found)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def fuse(model: Model) -> Model:
    """Let the encoder layers of a model answer in fewer passes over memory; for CPUs.

    Attention, the sums with their layer normalisations, and the activation behind a packed linear layer become one
    native op each; w8a8 layers are one call altogether (docs/kernels.md says what that is worth). Results are those of
    the layers within float32's rounding (what a w8a8 layer rounds between two whole numbers may take the other one).
    Nothing else changes: parameters, names, saving; and in training, with gradients, on other devices, in other
    element types or for `output_attentions` the layers run as before.

    Knows the layers of BERT, RoBERTa, CamemBERT, XLM-RoBERTa, ELECTRA and DistilBERT, dense, pruned or quantized, and
    leaves all others alone. Returns the model, edited in place. `pykd serve` does this to every model it loads.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> model = fuse(BertModel(BertConfig(**sizes, vocab_size=9)).eval())
    >>> with torch.inference_mode():
    ...     model(torch.tensor([[1, 2]])).last_hidden_state.shape
    torch.Size([1, 2, 8])
    """
    masks = _Masks()
    for module in model.modules():
        if not type(module).__module__.startswith("transformers."):
            continue
        if type(module).__name__ in FAMILIES and _is_plain(module):
            module.forward = FusedForward(module, masks)
        if type(module).__name__ in MODELS and not cast("Any", module).config.is_decoder:
            module.forward = FusedModel(module, masks)
    return model


def _is_plain(layer: Any) -> bool:
    """Whether the layer is the encoder's: no cross-attention, no feed-forward in chunks, absolute positions only."""
    chunked = getattr(layer, "chunk_size_feed_forward", 0) or getattr(layer, "is_decoder", False)
    look = getattr(layer.attention, "self", layer.attention)
    return not chunked and getattr(look, "position_embedding_type", "absolute") == "absolute"
