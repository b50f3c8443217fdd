"""Quantization of real models: what becomes of each layer, that it computes what it stores, and what is refused."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from pykd import from_pretrained, save_pretrained
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule, Conv2d4bit, Linear4bit
from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.pruning import prune
from pykd.quantization import SCHEMES, quantize
from pykd.quantization.quantize import stored_bytes

TOKENS = torch.arange(3, 17).view(2, 7)
#: scheme: largest relative error of the layer's output that plain rounding may make (L2, random weights)
TOLERANCE = {"w4a16": 0.16, "w4a8": 0.16, "nf4": 0.13, "fp4": 0.17, "w8a8": 0.015, "w8a16": 0.01}
TOLERANCE |= {"w8a8_static": 0.015, "bf16": 0.004, "fp16": 0.001}
#: scheme: how its layers end, and the largest share of the bytes that they take
KINDS = {scheme: ("16bit", 0.52) if "16" in scheme[:4] and scheme[0] != "w" else ("8bit", 0.27) for scheme in SCHEMES}
KINDS |= dict.fromkeys(("w4a16", "w4a8", "nf4", "fp4"), ("4bit", 0.15))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.Flatten(),
        nn.Linear(576, 64),
        nn.Linear(64, 4),
    ).eval()


IMAGES = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_are_packed_and_still_compute(scheme: str) -> None:
    model = network()
    dense = copy.deepcopy(model)
    data = [IMAGES] if scheme == "w8a8_static" else None
    assert quantize(model, scheme, data=data) is model
    kind, share = KINDS[scheme]
    assert [type(model[index]).__name__ for index in (0, 2, 4)] == [f"Conv2d{kind}", f"Conv2d{kind}", f"Linear{kind}"]
    assert type(model[5]) is nn.Linear
    with torch.inference_mode():
        x = IMAGES
        for index in range(5):  # each behind the exact ones
            want, got = dense[index](x), model[index](x)
            assert (got - want).norm() <= TOLERANCE[scheme] * want.norm()
            x = want
    entry = model.pykd_report[0]
    assert entry["stage"] == "quantize" and entry["method"] == "rtn" and entry["skipped"] == {"5": "output head"}
    assert entry["parameters"]["scheme"] == scheme and entry["parameters"]["samples"] == (4 if data else None)
    assert entry["parameters_before"] == entry["parameters_after"]
    for index in (0, 2, 4):
        facts = entry["changed"][str(index)]
        assert facts["bytes_before"] == stored_bytes(dense[index]) and facts["bytes_after"] == stored_bytes(
            model[index]
        )
    assert entry["changed"]["4"]["bytes_after"] < share * entry["changed"]["4"]["bytes_before"]
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_then_quantized_keeps_zeros_and_reloads(scheme: str, tmp_path: Path) -> None:
    model = prune(bert(), sparsity=0.75)
    masks = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, CompressedModule)}
    quantize(model, scheme, data=[{"input_ids": TOKENS}])
    assert len(model.pykd_report[1]["changed"]) >= 12
    for name, zero in masks.items():
        assert bool((model.get_submodule(name).weight[zero] == 0).all()), name
    assert model.pykd_report[1]["nonzero_after"] <= model.pykd_report[1]["nonzero_before"]
    with torch.inference_mode():
        want = model(input_ids=TOKENS).logits
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(input_ids=TOKENS).logits, want)


def test_sparse_layers_are_stored_sparse_where_that_is_smaller() -> None:
    sizes = {}
    for sparsity in (0.0, 0.5, 0.9):
        model = network()
        if sparsity:
            prune(model, sparsity=sparsity, include=["4"])
        quantize(model, include=["4"])
        sizes[sparsity] = stored_bytes(model[4])
    assert sizes[0.5] <= sizes[0.0] and sizes[0.9] < 0.6 * sizes[0.0]


def test_a_convolutional_network_reloads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_torchvision("mobilenet_v2", num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    quantize(model, "w4a16", include=["features.1?"], exclude=["features.18"])
    entry = model.pykd_report[0]
    assert type(model.features[18][0]) is nn.Conv2d and entry["skipped"]["features.18.0"] == "excluded by 'features.18'"
    assert type(model.features[17].conv[1][0]) is Conv2d4bit  # depthwise
    with torch.inference_mode():
        want = model(images)
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(images), want)


def test_small_layers_are_left_and_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(256, 256), nn.Linear(4, 4))
    quantize(model)
    reason = model.pykd_report[0]["skipped"]["0"]
    assert reason.startswith("would be stored in ") and reason.endswith("instead of 288 bytes: no gain")
    assert type(model[0]) is nn.Linear and isinstance(model[1], Linear4bit)


def test_what_has_no_packed_form_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.wave, self.gate = nn.Embedding(99, 64), nn.Conv1d(16, 64, 5), nn.GRU(32, 32)
            self.norm, self.small, self.layer = nn.LayerNorm(999), nn.Conv1d(2, 2, 2), nn.Linear(64, 64)
            self.position, self.head = nn.Parameter(torch.zeros(9, 64)), nn.Linear(64, 2)

    entry = quantize(Mixed()).pykd_report[0]
    assert list(entry["changed"]) == ["layer"]
    assert entry["skipped"] == {
        "": "no packed form of Mixed",
        "table": "embeddings=None leaves embeddings as they are",
        "wave": "no packed form of Conv1d",
        "gate": "no packed form of GRU",
        "head": "output head",
    }
    assert quantize(Mixed(), include=["layer"]).pykd_report[0]["skipped"] == {}
    assert "table" in quantize(Mixed(), embeddings="w8a16").pykd_report[0]["changed"]


@pytest.mark.parametrize("data", [None, [torch.randn(8, 64)]], ids=["rtn", "calibrated"])
def test_one_dense_layer_beside_the_packed_ones(data: list[torch.Tensor] | None) -> None:
    """When the codes of a layer are chosen, the dense weights of those before are gone."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 2))
    dense = [weakref.ref(model[index].weight) for index in range(4)]
    alive = []

    def watch(weight: torch.Tensor, inputs: object, *, code: str, group_size: int) -> FourBit:
        alive.append(sum(ref() is not None for ref in dense))
        return quantize_4bit(weight, code=code, group_size=group_size)

    quantize(model, method=watch, data=data)
    assert alive == [4, 3, 2, 1] and not any(ref() is not None for ref in dense)


def test_group_size_and_patterns() -> None:
    model = quantize(bert(), "nf4", group_size=32, include=["bert.encoder.layer.1"], exclude=["*.output.dense"])
    changed = model.pykd_report[0]["changed"]
    assert len(changed) == 4 and all(".layer.1." in name and "output" not in name for name in changed)
    assert model.bert.encoder.layer[1].intermediate.dense.group_size == 32
    assert model.pykd_report[0]["parameters"]["group_size"] == 32


def test_a_scheme_per_layer() -> None:
    schemes = {
        "*.layer.0.attention": "w8a8_static",
        "*.intermediate": "w4a16",
        "*.layer.0": "bf16",
        "classifier": "w8a16",
    }
    model = bert()
    quantize(model, schemes, data=[{"input_ids": TOKENS}], method="gptq", embeddings="w8a16", symmetric=False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedModule)}
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    first = "bert.encoder.layer.0"
    assert kinds[f"{first}.attention.self.query"] == "Linear8bit" and kinds[f"{first}.output.dense"] == "Linear16bit"
    assert model.get_submodule(f"{first}.attention.output.dense").static is not None
    assert kinds["bert.encoder.layer.1.intermediate.dense"] == kinds[f"{first}.intermediate.dense"] == "Linear4bit"
    assert (
        "bert.encoder.layer.1.output.dense" not in kinds and kinds["bert.embeddings.word_embeddings"] == "Embedding8bit"
    )
    assert model.pykd_report[0]["parameters"]["scheme"] == schemes
    model = quantize(bert(), {"bert.encoder.layer.0": "w8a8"}, include=["bert.encoder"])
    assert model.pykd_report[0]["skipped"]["bert.encoder.layer.1.output.dense"] == "no pattern of `scheme` fits it"


def test_a_function_is_a_scheme() -> None:
    def coarse(layer: nn.Module, group_size: int) -> CompressedModule:
        assert isinstance(layer, nn.Linear)
        return Linear4bit.from_linear(layer, group_size=layer.in_features)

    model = quantize(nn.Sequential(nn.Linear(128, 128), nn.Linear(4, 4)), coarse)
    assert model[0].group_size == 128 and model.pykd_report[0]["parameters"]["scheme"] == "coarse"


def test_half_precision_models() -> None:
    model = quantize(bert().to(torch.bfloat16))
    assert model(input_ids=TOKENS).logits.dtype == torch.bfloat16


def test_what_it_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="unknown scheme 'w4a61': did you mean 'w4a16'"):
        quantize(model, "w4a61")
    for several, message in (
        ({}, r"scheme names no layer: write \{pattern of layer names: scheme\}"),
        ({"0": 8}, r"several schemes are \{pattern of layer names: scheme\}, got \{'0': 8\}"),
        ({"0": "w9"}, "unknown scheme 'w9'"),
        ({"nowhere": "w8a8"}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, several)
    with pytest.raises(ValueError, match="method 'gptq' chooses 4-bit codes, and scheme 'w8a8' has none"):
        quantize(model, {"0": "w8a8"}, method="gptq", data=[IMAGES])
    for group_size in (0, 2.5, True):
        with pytest.raises(ValueError, match="group_size is the number of inputs that share a scale, at least 1, got"):
            quantize(model, group_size=group_size)  # type: ignore[arg-type]
    with torch.no_grad():
        model[4].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the model's '4\.weight' holds NaN or infinite values"):
        quantize(model)
    assert type(model[0]) is nn.Conv2d and not hasattr(model, "pykd_report")
