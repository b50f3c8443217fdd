"""GGUF files hold our weights, as gguf's own reader and transformers read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

import pykd
from pykd.errors import ArtifactError
from pykd.io.export import gguf as gguf_export
from pykd.io.export.dense import dense_simulation
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.nn import Linear4bit
from pykd.nn.slicing import feed_forward_blocks, keep_neurons

#: How a model is quantized, the type of its layers in the file, and how close the weights are.
SCHEMES: dict[str, tuple[dict[str, Any], str, float]] = {
    "int4": ({"scheme": "w4a16", "group_size": 32, "embeddings": "w4a16"}, "Q4_0", 1e-7),
    "int4 in groups of 64": ({"scheme": "w4a16", "group_size": 64}, "Q4_0", 1e-7),
    "uint4": ({"scheme": "w4a16", "group_size": 32, "symmetric": False}, "Q4_1", 5e-4),
    "int8": ({"scheme": "w8a16", "embeddings": "w8a16"}, "Q8_0", 5e-4),
}


def tiny_llama(**options: Any) -> Any:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, **options}
    return load_huggingface(None, "causal-lm", config=config).eval()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_reader_of_gguf_finds_our_weights(name: str, tmp_path: Path) -> None:
    options, kind, bound = SCHEMES[name]
    model = tiny_llama(tie_word_embeddings="embeddings" in options)
    pykd.quantize(model, **options)
    record = pykd.export(model, tmp_path / "model", format="gguf")
    assert record["check"]["largest_difference"] <= bound
    reader = gguf.GGUFReader(str(tmp_path / "model" / "model.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == types["blk.0.attn_q.weight"] == kind
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == (kind if "embeddings" in options else "F32")
    assert ("output.weight" in types) == ("embeddings" not in options)
    assert record["size_bytes"] == (tmp_path / "model" / "model.gguf").stat().st_size


def test_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    pykd.quantize(model, scheme="w4a16", group_size=32)
    pykd.export(model, tmp_path / "model", format="gguf")
    file = gguf.GGUFReader(str(tmp_path / "model" / "model.gguf"))
    found = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in file.tensors}
    again, simulated = tiny_llama(num_hidden_layers=2), dense_simulation(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    state = {}
    for key, own in again.state_dict().items():
        value = found[names.get_name(key, try_suffixes=(".weight",))].view_as(own)
        heads = 4 if "q_proj" in key else 2 if "k_proj" in key else None
        if heads is not None:  # back from neighbouring pairs to halves
            value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        state[key] = value
    again.load_state_dict(state)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        assert torch.equal(logits(again, batch), logits(simulated, batch))


def refused(model: nn.Module, tmp_path: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        gguf_export.write(model, tmp_path, [])


def test_other_families_and_positions_are_refused(tmp_path: Path, models: Callable[[str], nn.Module]) -> None:
    refused(models("bert"), tmp_path, "families llama, mistral; BertForSequenceClassification is not one")
    refused(models("resnet18"), tmp_path, "ResNet is not one: export it as onnx or dense")
    scaled = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    refused(scaled, tmp_path, "this llama has rotary positions of type 'linear', which is not written")
    refused(tiny_llama(model_type="mistral", sliding_window=8), tmp_path, "has attention in a sliding window")
    biased = tiny_llama()
    biased.register_buffer("extra", torch.zeros(2))
    with pytest.raises(ArtifactError, match="GGUF's llama has no place for the tensor 'extra'"):
        gguf_export.write(biased, tmp_path, [])


def test_layers_that_gguf_cannot_hold_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    pykd.quantize(model, scheme="nf4", group_size=32)
    refused(model, tmp_path, r"GGUF cannot hold 'model\.layers\.0\.\S+': its codes are nf4; quantize it to w4a16")
    model = tiny_llama()
    pykd.quantize(model, scheme="w4a16", group_size=16)
    refused(model, tmp_path, "its 64 inputs in groups of 16 are not blocks of 32 under one scale")
    model = tiny_llama(num_hidden_layers=2)
    keep_neurons(feed_forward_blocks(model)[0], range(64))
    pykd.quantize(model, scheme="w8a8")
    refused(model, tmp_path, "it has a width of its own, for which the configuration has no place")
    layer = Linear4bit.from_linear(nn.Linear(64, 4), activation="relu")
    with pytest.raises(ArtifactError, match="GGUF cannot hold 'x': it applies 'relu' itself"):
        gguf_export._check_layer("x", layer, (4, 64))


def test_weights_that_are_read_as_others_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    pykd.quantize(model, scheme="w4a16", group_size=32)
    monkeypatch.setattr(
        gguf_export, "_joined", lambda codes, numbers: torch.zeros(len(codes), 18 * codes.shape[1]).byte()
    )
    refused(model, tmp_path, r"gguf reads 'model\.\S+' as other weights \(by 1\)")
