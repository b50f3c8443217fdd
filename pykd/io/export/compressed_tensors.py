"""Folders in the layout of compressed-tensors, which vLLM and transformers read: int4, uint4 and int8 linear layers.

4-bit codes and those of w8a16 become "pack-quantized": `weight_packed` int32 [out, ceil(in * bits / 32)], the first
code in the lowest bits, shifted so that they are not negative; `weight_scale` [out, groups], `weight_shape`, and for
uint4 `weight_zero_point` int32 [ceil(out / 8), groups]. w8a8 becomes "int-quantized": int8 `weight`, `weight_scale`
[out, 1], and activations that the reader rounds to int8 per token; w8a8_static also, under the `input_scale` and
`input_zero_point`, [1] each, that stand beside the weight (readers use code -128 too, which pykd cuts off at -127).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io.export.dense import densify
from pykd.models.adapter import origin, unwrap
from pykd.nn import Linear4bit, Linear8bit, SparseLinear
from pykd.nn.compressed import CompressedModule
from pykd.nn.conv import CompressedConv2d
from pykd.ops.int4_r16 import groups_of, unpack_nibbles

NIBBLES_PER_WORD = 8
#: Schemes that have this layout, with what it calls their layout.
SCHEMES = {
    "w4a16": "pack-quantized",
    "w8a16": "pack-quantized",
    "w8a8": "int-quantized",
    "w8a8_static": "int-quantized",
}

Packed = Linear4bit | Linear8bit


def write(model: nn.Module, folder: Path, checked: Sequence[Any]) -> dict[str, Any]:
    """Write config.json and model.safetensors into `folder`, and read every weight back with compressed-tensors' code.

    Compressed embeddings are written dense. `checked` is not used: the weights are what is compared. Returns `notes`,
    and `check` with the number of layers compared. Raises ArtifactError for models that are not of transformers, and
    for schemes, shapes and mixtures that the layout does not have, naming the layer.
    """
    from pykd.io.save import WEIGHTS, snapshot, write_tensors

    model = unwrap(model)
    if origin(model)["source"] != "huggingface":
        raise ArtifactError(
            f"compressed-tensors holds models of transformers; {type(model).__name__} is not one: export it as onnx."
        )
    layers = _layers(model)
    dense: Any = densify(model)
    _, tensors = snapshot(dense)
    for name, layer in layers.items():
        if tensors[f"{name}.weight"].shape != (layer.rows, layer.columns):
            raise _refusal(name, "a width of its own, for which the configuration has no place")
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in pack(layer).items()}
    rest = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    config = copy.deepcopy(dense.config)
    config.architectures, config.dtype = [type(dense).__name__], str(dense.dtype).removeprefix("torch.")
    told = max(layers.values(), key=lambda layer: _groups(layer)[1])  # of one that has groups, if any has
    config.quantization_config = quantization_config(told, rest)
    config.save_pretrained(folder)
    if dense.can_generate():
        dense.generation_config.save_pretrained(folder)
    write_tensors(tensors, folder / WEIGHTS)
    notes = [f"dense: {', '.join(rest)}"] if rest else []
    pruned = sum(layer.nnz is not None for layer in layers.values())
    notes += [f"{pruned} pruned layers hold their zeros: the layout has no place for fewer codes"] if pruned else []
    embeddings = [n for n, m in model.named_modules() if isinstance(m, CompressedModule) and n not in layers]
    notes += [f"dequantized, because the layout has linear layers only: {', '.join(embeddings)}"] if embeddings else []
    return {"notes": notes, "check": _check(layers, folder / WEIGHTS, config.quantization_config)}


def _layers(model: nn.Module) -> dict[str, Packed]:
    """The layers that are written packed, all of one kind."""
    found: dict[str, Packed] = {}
    grouped = (_groups(module) for module in model.modules() if isinstance(module, (Linear4bit, Linear8bit)))
    group = next((size for size, number in grouped if number > 1), None)
    for name, module in model.named_modules():
        if isinstance(module, (SparseLinear, CompressedConv2d)):
            kind = "a convolution" if isinstance(module, CompressedConv2d) else "a sparse layer"
            raise _refusal(name, f"{kind}, which its readers do not have")
        if not isinstance(module, (Linear4bit, Linear8bit)):
            continue
        if module.scheme not in SCHEMES:
            raise _refusal(name, f"of scheme {module.scheme!r}; it holds {', '.join(SCHEMES)}")
        if module.activation is not None:
            raise _refusal(name, f"followed by {module.activation!r} inside the same layer")
        size, number = _groups(module)
        if number > 1 and module.columns % size:
            raise _refusal(name, f"in groups of {size}, of which the last of its {module.columns} inputs is shorter")
        first = next(iter(found.values()), module)
        kind, before = _kind(module, group), _kind(first, group)
        if kind != before:
            raise _refusal(name, f"{kind}, where the layers before are {before}: one kind a folder")
        found[name] = module
    if not found:
        raise ArtifactError(
            f"compressed-tensors: {type(model).__name__} has no quantized linear layer; quantize it to "
            f"{', '.join(SCHEMES)}, or export it as dense."
        )
    return found


def _groups(layer: Packed) -> tuple[int, int]:
    if layer.group_size is None:
        return layer.columns, 1
    groups = groups_of(layer.columns, layer.group_size)
    return groups.size, groups.number


def _kind(layer: Packed, group: int | None) -> str:
    """group: the size of the groups where layers have several; a row that one such group fills counts to them."""
    size, number = _groups(layer)
    symmetric = "" if getattr(layer, "symmetric", True) else ", asymmetric"
    return f"{layer.scheme}, {f'groups of {size}' if number > 1 or size == group else 'a scale per output'}{symmetric}"


def quantization_config(layer: Packed, dense: list[str]) -> dict[str, Any]:
    """The entry of config.json for linear layers like `layer`; those named `dense` stay as they are."""
    size, number = _groups(layer)
    groups = {"strategy": "group", "group_size": size} if number > 1 else {"strategy": "channel", "group_size": None}
    bits = 4 if isinstance(layer, Linear4bit) else 8
    integer = {"num_bits": bits, "type": "int", "symmetric": getattr(layer, "symmetric", True), "dynamic": False}
    eight = {"num_bits": 8, "type": "int"}
    rounded = {
        "w8a8": {**eight, "symmetric": True, "strategy": "token", "dynamic": True},
        "w8a8_static": {**eight, "symmetric": False, "strategy": "tensor", "dynamic": False},
    }
    layout, inputs = SCHEMES[layer.scheme], rounded.get(layer.scheme)
    group = {"targets": ["Linear"], "weights": {**integer, **groups}, "input_activations": inputs, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": dense,
    }


def pack(layer: Packed) -> dict[str, Tensor]:
    """The tensors of one layer by the names of the layout."""
    shape = torch.tensor([layer.rows, layer.columns])
    if isinstance(layer, Linear8bit):
        codes, scales = layer._tensors()
        scales = scales.view(layer.rows, -1)
        if layer.static is not None:
            point = torch.tensor([layer.static.zero], dtype=torch.int8)
            static = {"input_scale": torch.tensor([layer.static.scale]), "input_zero_point": point}
            return {"weight": codes, "weight_scale": scales, **static}
        if layer.scheme == "w8a8":
            return {"weight": codes, "weight_scale": scales}
        shifted = (codes.short() + 128).to(torch.uint8)
        return {"weight_packed": _words(shifted), "weight_scale": scales, "weight_shape": shape}
    qweight, scales, zeros = layer._tensors()
    tensors = {"weight_packed": _words(qweight), "weight_scale": scales.float(), "weight_shape": shape}
    if zeros is not None:
        points = unpack_nibbles(zeros, scales.shape[1]).int().t()  # [groups, out]
        points = F.pad(points, (0, -points.shape[1] % NIBBLES_PER_WORD)).view(len(points), -1, NIBBLES_PER_WORD)
        shifts = torch.arange(NIBBLES_PER_WORD, dtype=torch.int32) * 4
        tensors["weight_zero_point"] = (points << shifts).sum(-1).to(torch.int32).t().contiguous()
    return tensors


def _words(values: Tensor) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, ceil(n / 4)], the first byte lowest."""
    return F.pad(values, (0, -values.shape[1] % 4)).contiguous().view(torch.int32)


def _check(layers: dict[str, Packed], file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the package itself makes of the file must be the weights of the layers, bit for bit or by one rounding."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    parsed = QuantizationConfig.model_validate(config)
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    scheme = parsed.config_groups["group_0"]
    tensors = load_file(file)
    largest = 0.0
    for name, layer in layers.items():
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        got, want = compressor.decompress(state, scheme)["weight"].float(), layer.dequantize().float()
        gap = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
        if not gap <= 1e-6:
            raise ArtifactError(
                f"compressed-tensors reads {name!r} as other weights (by {gap:.2g}); nothing was exported."
            )
        largest = max(largest, gap)
    return {"layers": len(layers), "largest_difference": largest}


def _refusal(name: str, what: str) -> ArtifactError:
    return ArtifactError(f"compressed-tensors cannot hold {name!r}: it is {what}. Export it as onnx or dense instead.")
