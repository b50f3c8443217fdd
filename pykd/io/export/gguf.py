"""GGUF files of Llama models: blocks of 32 codes under a float16 scale, as llama.cpp computes with them.

int4 becomes Q4_0, weight = (code - 8) * d, bit for bit; uint4 becomes Q4_1, weight = code * d + m, where m = -zero * d
is rounded to float16; int8 becomes Q8_0, weight = code * d, where d is rounded to float16. A group of 64 or more is
several blocks with the same scale. Everything else is float32, or float16 where the model is in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io.export.dense import densify
from pykd.models.adapter import unwrap
from pykd.nn.compressed import CompressedModule
from pykd.nn.linear_4bit import Weight4bit
from pykd.nn.linear_8bit import Weight8bit
from pykd.nn.tied import Tied
from pykd.ops.int4_r16 import groups_of, unpack_nibbles

FILE = "model.gguf"
BLOCK = 32
FAMILIES = ("llama", "mistral")
#: Largest difference of a weight, as a share of the layer's largest: what rounding a float32 to float16 can do.
BOUND = 1e-3
#: GGML's numbers of the types that are written.
Q4_0, Q4_1, Q8_0 = 2, 3, 8


def write(model: nn.Module, folder: Path, checked: Sequence[Any]) -> dict[str, Any]:
    """Write `model.gguf` into `folder`, and compare every weight that gguf's own reader finds in it with the model's.

    `checked` is not used: the weights are what is compared. Returns `notes` and `check`. Raises ArtifactError for
    other families, and for layers whose codes or widths GGUF does not have, naming them.
    """
    import gguf

    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    _check_family(model, config)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, (Weight4bit, Weight8bit))}
    dense: Any = densify(model)
    for name, layer in packed.items():
        _check_layer(name, layer, tuple(dense.get_submodule(name).weight.shape))
    config = dense.config
    writer = gguf.GGUFWriter(str(folder / FILE), "llama")
    _describe(writer, config, folder.name)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = set(getattr(dense, "all_tied_weights_keys", {}))
    wanted: dict[str, tuple[str, Tensor]] = {}
    for key, value in dense.state_dict().items():
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ArtifactError(f"GGUF's llama has no place for the tensor {key!r}; export the model as onnx or dense.")
        if key in tied:
            continue
        rows = _order(key, value.shape[0], config)
        wanted[place] = key, value.detach().float()[rows]
        quantized = packed.get(key.removesuffix(".weight"))
        if quantized is not None:
            blocks, kind = _blocks(quantized, rows)
            writer.add_tensor(place, blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind))
        else:
            half = value.dim() > 1 and value.dtype in (torch.float16, torch.bfloat16)
            writer.add_tensor(place, value.detach().to(torch.float16 if half else torch.float32)[rows].numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    kept = [n for n, m in model.named_modules() if isinstance(m, CompressedModule) and n not in packed]
    kept = [name for name in kept if not isinstance(model.get_submodule(name), Tied)]
    notes = ["without a vocabulary: convert the tokenizer with llama.cpp's own script, or pass tokens"]
    notes += [f"dense: {', '.join(kept)}"] if kept else []
    return {"notes": notes, "check": {"layers": len(packed), "largest_difference": _check(folder / FILE, wanted)}}


def _check_family(model: nn.Module, config: Any) -> None:
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise ArtifactError(
            f"GGUF is written for language models of the families {', '.join(FAMILIES)}; {type(model).__name__} is not "
            "one: export it as onnx or dense."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default" or getattr(config, "sliding_window", None):
        told = f"rotary positions of type {rope!r}" if rope != "default" else "attention in a sliding window"
        raise ArtifactError(f"this {kind} has {told}, which is not written to GGUF here: export it as onnx or dense.")


def _check_layer(name: str, layer: Weight4bit | Weight8bit, shape: tuple[int, ...]) -> None:
    refusal = f"GGUF cannot hold {name!r}: "
    group = groups_of(layer.columns, layer.group_size or layer.columns)
    if isinstance(layer, Weight4bit) and layer.code not in ("int4", "uint4"):
        raise ArtifactError(f"{refusal}its codes are {layer.code.split(':')[0]}; quantize it to w4a16, w8a16 or w8a8.")
    if layer.columns % BLOCK or (group.number > 1 and group.size % BLOCK):
        raise ArtifactError(
            f"{refusal}its {layer.columns} inputs in groups of {group.size} are not blocks of {BLOCK} under one scale."
        )
    if getattr(layer, "activation", None) is not None:
        raise ArtifactError(f"{refusal}it applies {layer.activation!r} itself; pass activation=None.")
    if shape != (layer.rows, layer.columns):
        raise ArtifactError(f"{refusal}it has a width of its own, for which the configuration has no place.")


def _describe(writer: Any, config: Any, name: str) -> None:
    """What llama.cpp has to know of the network."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _order(key: str, rows: int, config: Any) -> Tensor:
    """The order of a tensor's rows: GGUF's llama rotates neighbouring pairs of a head, transformers its two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((number for name, number in heads.items() if f".{name}." in key), None)
    order = torch.arange(rows)
    return order if found is None else order.view(found, 2, -1).transpose(1, 2).flatten()


def _blocks(layer: Weight4bit | Weight8bit, rows: Tensor) -> tuple[Tensor, int]:
    """uint8 [rows, bytes of their blocks], and the type."""
    if isinstance(layer, Weight8bit):
        codes, scales = layer._tensors()
        return _joined(codes.view(torch.uint8).view(layer.rows, -1, BLOCK), [_spread(layer, scales)])[rows], Q8_0
    qweight, scales, zeros = layer._tensors()
    codes = unpack_nibbles(qweight, layer.columns).view(layer.rows, -1, 2, BLOCK // 2)
    halves = codes[:, :, 0] | (codes[:, :, 1] << 4)  # the first 16 codes of a block are the low halves of its bytes
    spread = _spread(layer, scales)
    if zeros is None:
        return _joined(halves, [spread])[rows], Q4_0
    points = _spread(layer, unpack_nibbles(zeros, scales.shape[1]))
    return _joined(halves, [spread, -points * spread])[rows], Q4_1


def _spread(layer: Weight4bit | Weight8bit, values: Tensor) -> Tensor:
    """float32 [rows, blocks] of one number per row or group."""
    values = values.float().view(layer.rows, -1)
    return values.repeat_interleave(layer.columns // BLOCK // values.shape[1], dim=1)


def _joined(codes: Tensor, numbers: list[Tensor]) -> Tensor:
    """Blocks of bytes behind their float16 numbers."""
    head = torch.stack(numbers, dim=-1).half().contiguous().view(torch.uint8)
    return torch.cat([head.view(*codes.shape[:2], -1), codes], dim=-1).flatten(1)


def _check(file: Path, wanted: dict[str, tuple[str, Tensor]]) -> float:
    """What gguf's reader and its own dequantization make of the file must be the model's weights."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    largest = 0.0
    for place, (key, want) in wanted.items():
        got = torch.from_numpy(gguf.dequantize(found[place].data, found[place].tensor_type).copy()).view_as(want)
        gap = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
        if not gap <= BOUND:
            raise ArtifactError(f"gguf reads {key!r} as other weights (by {gap:.2g}); nothing was exported.")
        largest = max(largest, gap)
    return largest
