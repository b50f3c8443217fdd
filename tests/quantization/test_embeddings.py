"""Embeddings of real models: half a small model in fewer bits, weights that stay tied, and what reloads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pykd import from_pretrained, save_pretrained
from pykd.data.bundle import DataBundle, stack
from pykd.errors import ArtifactError
from pykd.evaluation.counting import count_parameters
from pykd.io import structure
from pykd.models.huggingface import load_huggingface
from pykd.nn import Embedding4bit, Embedding8bit, Linear4bit, TiedEmbedding, TiedLinear
from pykd.pipeline.stages import Context, apply_stage
from pykd.quantization import quantize
from pykd.recipe import load_recipe

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 70}
T5 = {"model_type": "t5", "vocab_size": 99, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 70, "d_kv": 16}
#: task, configuration, the embedding, what is tied to it
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "bert": (
        "masked-lm",
        {"model_type": "bert", **SIZES},
        "bert.embeddings.word_embeddings",
        ["cls.predictions.decoder"],
    ),
    "llama": (
        "causal-lm",
        {"model_type": "llama", "tie_word_embeddings": True, **SIZES},
        "model.embed_tokens",
        ["lm_head"],
    ),
    "t5": ("seq2seq-lm", T5, "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}
IDS = torch.arange(3, 17).view(2, 7)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return load_huggingface(None, MODELS[family][0], config=MODELS[family][1]).eval()


@torch.no_grad()
def forward(model: nn.Module, family: str) -> Tensor:
    extra = {"decoder_input_ids": IDS} if family == "t5" else {}
    found: Tensor = model(input_ids=IDS, **extra).logits
    return found


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_tied_weights_are_quantized_once_and_stay_tied(family: str, scheme: str, tmp_path: Path) -> None:
    _, _, table, partners = MODELS[family]
    model = make(family)
    dense = forward(model, family)
    quantize(model, "w4a16", embeddings=scheme, group_size=32)
    entry = model.pykd_report[-1]
    packed = model.get_submodule(table)
    assert type(packed) is (Embedding8bit if scheme == "w8a16" else Embedding4bit)
    assert entry["changed"][table]["type"] == type(packed).__name__ and entry["parameters"]["embeddings"] == scheme
    for name in partners:
        assert model.get_submodule(name).source is packed
        assert entry["changed"][name] == {"type": type(model.get_submodule(name)).__name__, "tied_to": table}
        assert name not in entry["skipped"]
    assert entry["parameters_before"] == entry["parameters_after"] == count_parameters(model)[0]
    want = forward(model, family)
    assert (want - dense).norm() < 0.3 * dense.norm()
    save_pretrained(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert f"{table}.qweight" in stored and not [k for k in stored if k.startswith(tuple(f"{p}.q" for p in partners))]
    assert sum(tensor.numel() == 99 * 32 for tensor in stored.values()) == (scheme == "w8a16")
    for loaded in (from_pretrained(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model")):
        assert torch.equal(forward(loaded, family), want)
        assert all(loaded.get_submodule(name).source is loaded.get_submodule(table) for name in partners)
    save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(forward(from_pretrained(tmp_path / "again"), family), want)
    loaded.save_pretrained(tmp_path / "by transformers")
    assert torch.equal(forward(type(model).from_pretrained(tmp_path / "by transformers"), family), want)
    assert torch.equal(forward(copy.deepcopy(model), family), want)


def test_another_head_takes_the_embedding_without_the_projection(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = quantize(make("bert"), "nf4", embeddings="w8a16")
    save_pretrained(model, tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False)
    with torch.no_grad():
        want = model.bert(input_ids=IDS).last_hidden_state
        assert torch.equal(base(input_ids=IDS).last_hidden_state, want)
    assert "qweight" in dict(base.embeddings.word_embeddings.named_buffers())  # nothing multiplies with it there


def test_embeddings_are_left_alone_by_default_and_by_pattern() -> None:
    model = quantize(make("bert"), "w4a16")
    assert not [name for name in model.pykd_report[-1]["changed"] if "embeddings" in name]
    only = quantize(make("bert"), embeddings="nf4", include=["*embeddings*"], exclude=["*.position_embeddings"])
    entry = only.pykd_report[-1]
    assert list(entry["changed"]) == ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]
    assert entry["skipped"]["bert.embeddings.position_embeddings"] == "excluded by '*.position_embeddings'"
    assert entry["skipped"]["bert.embeddings.token_type_embeddings"].endswith("instead of 256 bytes: no gain")
    kept = quantize(make("bert"), embeddings="w8a16", exclude=["cls.predictions.decoder"])
    reason = kept.pykd_report[-1]["skipped"]["bert.embeddings.word_embeddings"]
    assert reason == "shares its weight with 'cls.predictions.decoder', which is excluded"
    assert kept.cls.predictions.decoder.weight is kept.bert.embeddings.word_embeddings.weight


def test_embeddings_come_before_the_layers_that_calibrate_behind_them() -> None:
    model = make("bert")
    data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    quantize(model, "w4a16", method="gptq", data=data, embeddings="w4a16", symmetric=False)
    assert isinstance(model.cls.predictions.decoder, TiedLinear)
    assert model.bert.embeddings.word_embeddings.code == "uint4"
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, Linear4bit)
    again = quantize(make("bert"), "nf4", embeddings="w4a16")
    assert again.bert.embeddings.word_embeddings.code == "int4"


def test_a_recipe_stage_takes_them(tmp_path: Path) -> None:
    content: dict[str, Any] = {"name": "tied", "data": {"kind": "digits"}}
    content["teacher"] = {"source": "huggingface", "name": "somewhere"}
    content["stages"] = [{"quantize": {"embeddings": "nf4", "group_size": None}}]
    recipe = load_recipe(content)
    items = [{"input_ids": IDS[0], "labels": 0}]
    data = DataBundle(items, items, stack, ["a"], "one")
    model = apply_stage(recipe.stages[0], make("llama"), Context(recipe, data, make("llama"), tmp_path, False, "1"))
    assert isinstance(model.lm_head, TiedLinear) and model.model.embed_tokens.scheme == "nf4"
    assert model.model.embed_tokens.group_size == 32 and model.model.layers[0].mlp.down_proj.group_size == 70


def test_what_is_left_and_refused() -> None:
    model = nn.Sequential(nn.Embedding(400, 64, max_norm=1.0), nn.Linear(64, 64), nn.Linear(64, 2))
    quantize(model, embeddings="w8a16")
    assert model.pykd_report[-1]["skipped"]["0"] == "rescales its rows in each lookup (max_norm)"
    with pytest.raises(ValueError, match="unknown scheme for embeddings 'w8a8': did you mean 'w8a16'"):
        quantize(model, embeddings="w8a8")
    scaled = nn.Embedding(400, 64)
    odd = nn.Sequential(scaled, nn.Bilinear(64, 64, 400))
    odd[1].weight = scaled.weight
    with pytest.raises(ValueError, match="0: shares its weight with '1'"):
        quantize(odd, embeddings="w8a16")


def test_a_damaged_tie_is_named() -> None:
    model = quantize(make("bert"), embeddings="w8a16")
    fresh = make("bert")
    described = structure.difference(model, fresh)
    assert described.sources == {"cls.predictions.decoder": "bert.embeddings.word_embeddings"}
    assert structure.Structure.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    described.sources["cls.predictions.decoder"] = "bert.encoder"
    with pytest.raises(ArtifactError, match=r"ties 'cls.predictions.decoder', a TiedLinear, to 'bert.encoder', a Bert"):
        structure.apply(fresh, described)
    model.bert.embeddings.word_embeddings = nn.Embedding(99, 32)
    with pytest.raises(
        ArtifactError, match=r"'cls\.predictions\.decoder' uses the weight of an embedding that is not in"
    ):
        structure.difference(model, make("bert"))


def test_sharing_embeddings_follow_the_first() -> None:
    model = nn.Sequential(nn.Embedding(400, 64), nn.Embedding(400, 64), nn.Linear(64, 400, bias=False))
    model[1].weight = model[2].weight = model[0].weight
    quantize(model, embeddings="w4a16")
    assert [type(module) for module in model] == [Embedding4bit, TiedEmbedding, TiedLinear]
