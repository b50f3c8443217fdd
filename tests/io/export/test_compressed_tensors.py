"""Folders of compressed-tensors hold our weights, as the package and transformers read them, without pykd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pykd
from pykd.errors import ArtifactError
from pykd.io.export import compressed_tensors
from pykd.io.export.dense import dense_simulation
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.nn import Linear4bit
from pykd.nn.slicing import feed_forward_blocks, keep_neurons

BATCH = {"input_ids": torch.arange(12).view(2, 6)}
SCHEMES: dict[str, dict[str, Any]] = {
    "groups": {"scheme": "w4a16", "group_size": 32},
    "asymmetric": {"scheme": "w4a16", "group_size": 32, "symmetric": False},
    "rows": {"scheme": "w4a16", "group_size": None},
    "w8a16": {"scheme": "w8a16"},
    "w8a8": {"scheme": "w8a8"},
    "w8a8_static": {"scheme": "w8a8_static", "data": [BATCH]},
}

TRANSFORMERS_ALONE = """
import pathlib, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    batch = load_file(folder / "batch.safetensors")
    want = batch.pop("want")
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config).eval()
    with torch.no_grad():
        got = model(**batch).logits
    limit = 0.05 if folder.name.startswith("w8a8") else 1e-5  # activations may be rounded
    assert (got - want).abs().max() <= limit * want.abs().max(), (folder.name, (got - want).abs().max())
    print(folder.name)
"""


def tiny_llama(**options: Any) -> Any:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, **options}
    return load_huggingface(None, "causal-lm", config=config).eval()


def exported_config(model: nn.Module, folder: Path) -> Any:
    """What the configuration of its folder says of the quantization."""
    pykd.export(model, folder / "model", format="compressed-tensors")
    return json.loads((folder / "model" / "config.json").read_text())["quantization_config"]


def test_transformers_reads_them_without_pykd(tmp_path: Path, without_pykd: Callable[..., str]) -> None:
    for name, options in SCHEMES.items():
        model = tiny_llama()
        pykd.quantize(model, **options, embeddings="w8a16" if name == "groups" else None)
        record = pykd.export(model, tmp_path / name / "model", format="compressed-tensors")
        assert record["check"]["layers"] == 7 and record["check"]["largest_difference"] < 1e-6
        assert record["notes"][0] == "dense: lm_head"
        with torch.no_grad():
            want = logits(dense_simulation(model), BATCH)
        save_file({**BATCH, "want": want}, tmp_path / name / "batch.safetensors")
    assert "embed_tokens" in json.dumps(
        json.loads((tmp_path / "groups/model/pykd_manifest.json").read_text())["stages"]
    )
    assert without_pykd(TRANSFORMERS_ALONE, tmp_path).split() == sorted(SCHEMES)


def test_the_configuration_says_the_scheme(tmp_path: Path) -> None:
    model = tiny_llama()
    pykd.quantize(model, scheme="w8a8")
    config = exported_config(model, tmp_path)
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "int-quantized"
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == 8 and group["input_activations"]["strategy"] == "token"


def test_static_scales_stand_beside_the_weights(tmp_path: Path) -> None:
    """x = input_scale * (code - input_zero_point), one of each for a layer."""
    model = tiny_llama()
    pykd.quantize(model, **SCHEMES["w8a8_static"])
    config = exported_config(model, tmp_path)
    told = config["config_groups"]["group_0"]["input_activations"]
    assert (told["strategy"], told["dynamic"], told["symmetric"]) == ("tensor", False, False)
    tensors, layer = load_file(tmp_path / "model" / "model.safetensors"), model.model.layers[0].mlp.down_proj
    scale, zero = (tensors[f"model.layers.0.mlp.down_proj.input_{name}"] for name in ("scale", "zero_point"))
    assert (scale.shape, zero.shape, zero.dtype) == ((1,), (1,), torch.int8)
    assert (scale.item(), zero.item()) == (pytest.approx(layer.static.scale), layer.static.zero)


def test_a_row_that_one_group_fills_is_of_the_kind_of_the_others(tmp_path: Path) -> None:
    """As behind the heads that pruning leaves."""
    model = pykd.prune(tiny_llama(), "heads", 0.5)
    assert model.model.layers[0].self_attn.o_proj.in_features == 32
    pykd.quantize(model, scheme="w4a16", group_size=32)
    assert pykd.export(model, tmp_path / "model", format="compressed-tensors")["check"]["layers"] == 7


def test_pruned_layers_are_written_with_their_zeros_and_it_is_said(tmp_path: Path) -> None:
    model = tiny_llama()
    pykd.quantize(pykd.prune(model, pattern="2:4"), scheme="w8a8")
    record = pykd.export(model, tmp_path / "model", format="compressed-tensors")
    assert "7 pruned layers hold their zeros: the layout has no place for fewer codes" in record["notes"]
    weight = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert int((weight.view(-1, 4) == 0).sum(1).min()) == 2


# Refusals.


def refused(model: nn.Module, tmp_path: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        compressed_tensors.write(model, tmp_path, [])


def test_what_the_layout_does_not_hold_is_refused_by_name(tmp_path: Path, models: Callable[[str], nn.Module]) -> None:
    refused(models("resnet18"), tmp_path, "compressed-tensors holds models of transformers; ResNet is not one")
    refused(models("bert"), tmp_path, "BertForSequenceClassification has no quantized linear layer")
    model = tiny_llama()
    pykd.quantize(model, scheme="nf4")
    refused(
        model, tmp_path, r"cannot hold 'model\.layers\.0\.\S+': it is of scheme 'nf4'; it holds w4a16, w8a16, w8a8, "
    )
    model = tiny_llama()
    pykd.quantize(model, scheme="w4a16", group_size=40)
    refused(model, tmp_path, "it is in groups of 40, of which the last of its 64 inputs is shorter")
    model = tiny_llama()
    pykd.quantize(model, scheme="w8a8", include=["*q_proj"])
    pykd.quantize(model, scheme="w8a16", include=["*k_proj"])
    refused(model, tmp_path, "it is w8a16, a scale per output, where the layers before are w8a8, a scale per output")
    model = tiny_llama()
    pykd.prune(model, sparsity=0.5)
    refused(model, tmp_path, "it is a sparse layer, which its readers do not have")
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Linear4bit.from_linear(attention.q_proj, activation="relu")
    refused(model, tmp_path, "it is followed by 'relu' inside the same layer")


def test_widths_that_would_be_filled_up_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    keep_neurons(feed_forward_blocks(model)[0], range(32))
    pykd.quantize(model, scheme="w8a8")
    refused(model, tmp_path, r"'model\.layers\.0\.mlp\.gate_proj': it is a width of its own")


def test_weights_that_are_read_as_others_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    pykd.quantize(model, scheme="w4a16", group_size=32)
    right = compressed_tensors.pack

    def wrong(layer: Any) -> dict[str, torch.Tensor]:
        return {k: v + 1 if k == "weight_packed" else v for k, v in right(layer).items()}

    monkeypatch.setattr(compressed_tensors, "pack", wrong)
    refused(model, tmp_path, r"compressed-tensors reads 'model\.\S+' as other weights")
