"""A dense folder holds what the compressed model computes, for people who have no pykd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pykd
from pykd.errors import ArtifactError
from pykd.io.export.dense import dense_simulation, densify
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule, Linear4bit
from pykd.nn.channels import remove_channels
from pykd.nn.slicing import feed_forward_blocks, keep_neurons

Variants = Callable[[str, str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]

TRANSFORMERS_ALONE = """
import pathlib, torch, transformers
from safetensors.torch import load_file
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    auto = "AutoModelForImageClassification" if "vit" in folder.name else "AutoModelForSequenceClassification"
    batch = load_file(folder / "batch.safetensors")
    want = batch.pop("want")
    model, info = getattr(transformers, auto).from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        got = model(**batch).logits
    assert (got - want).abs().max() <= 1e-6 * want.abs().max(), (folder.name, got, want)
    print(folder.name)
"""


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


def test_transformers_alone_computes_the_dense_simulation(
    tmp_path: Path, variants: Variants, batches: Batches, without_pykd: Callable[..., str]
) -> None:
    names = ["bert_pruned_4bit", "bert_sparse_4bit", "distilbert_8bit", "vit_pruned", "vit_sparse"]
    for name in names:
        family, _, variant = name.partition("_")
        model, batch = variants(family, variant), batches(family)
        pykd.save_pretrained(model, tmp_path / name / "model", format="dense")
        want = forward(dense_simulation(model), batch)
        save_file({**batch, "want": want}, tmp_path / name / "batch.safetensors")
    assert without_pykd(TRANSFORMERS_ALONE, tmp_path).split() == names


@pytest.mark.parametrize(("family", "variant"), [("resnet18", "pruned"), ("mobilenet_v2", "4bit")])
def test_the_card_of_a_torchvision_model_says_how_to_load_it(
    family: str, variant: str, tmp_path: Path, variants: Variants, batches: Batches
) -> None:
    model, batch = variants(family, variant), batches(family)
    folder = pykd.save_pretrained(model, tmp_path / "model", format="dense")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "pykd" not in code
    scope: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)), scope)
    want, got = forward(dense_simulation(model), batch), forward(scope["model"], batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    torch.testing.assert_close(forward(pykd.from_pretrained(folder), batch), got)


def test_pruned_weights_are_zeros_in_place(tmp_path: Path, variants: Variants) -> None:
    model = variants("bert", "sparse")
    folder = pykd.save_pretrained(model, tmp_path / "model", format="dense")
    tensors = load_file(folder / "model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedModule)}
    assert layers
    for name, layer in layers.items():
        weight = tensors[f"{name}.weight"]
        assert torch.equal(weight, layer.dequantize())
        assert 0.3 < (weight == 0).float().mean() < 0.8


def test_widths_that_the_configuration_can_say_are_kept(tmp_path: Path, models: Callable[[str], nn.Module]) -> None:
    model: Any = models("bert")
    for units, block in zip((30, 21), feed_forward_blocks(model), strict=True):
        keep_neurons(block, range(units))
    del model.bert.encoder.layer[0].attention.self.key.bias  # a module that is described by its class: no bias there
    model.bert.encoder.layer[0].attention.self.key.register_parameter("bias", None)
    folder = pykd.save_pretrained(model, tmp_path / "model", format="dense")
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 30 and "quantization_config" not in config
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        assert tensors[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].shape == (30, 32)
    assert not tensors["bert.encoder.layer.0.attention.self.key.bias"].any()
    assert model.config.intermediate_size == 70, "the model and its configuration stay as they were"


def tiny_lm(**config: Any) -> Any:
    content = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40}
    content |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **config}
    return load_huggingface(None, "causal-lm", config=content).eval()


def test_tied_embeddings_stay_tied_and_strangers_do_not(tmp_path: Path) -> None:
    model = tiny_lm(tie_word_embeddings=True)
    pykd.quantize(model, scheme="w4a16", embeddings="w8a16")
    batch = {"input_ids": torch.arange(10)[None]}
    folder = pykd.save_pretrained(model, tmp_path / "tied", format="dense")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(forward(pykd.from_pretrained(folder), batch), forward(dense_simulation(model), batch))

    first, second = model.model.layers
    second.self_attn.k_proj = first.self_attn.k_proj  # nobody else would share these
    model.lm_head = nn.Linear(32, 64, bias=False)  # and the configuration says that this is shared
    folder = pykd.save_pretrained(model, tmp_path / "untied", format="dense")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    loaded: Any = pykd.from_pretrained(folder)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(forward(loaded, batch), forward(dense_simulation(model), batch))


def test_one_dtype_that_holds_all_of_them(tmp_path: Path, models: Callable[[str], nn.Module]) -> None:
    model: Any = models("vit").to(torch.bfloat16)
    model.classifier.float()
    folder = pykd.save_pretrained(model, tmp_path / "model", format="dense")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}


# Refusals.


def test_layers_that_are_gone_are_refused(models: Callable[[str], nn.Module]) -> None:
    model: Any = models("resnet18")
    del model.layer3[1:]
    with pytest.raises(ArtifactError, match=r"no ordinary resnet18 computes what this model does: it lacks layer3\.1"):
        densify(model)


def test_zeros_that_would_change_the_result_are_refused() -> None:
    model = load_torchvision("squeezenet1_1", 3).eval()
    remove_channels(model, torch.zeros(1, 3, 64, 64), 0.5)
    with pytest.raises(ArtifactError, match=r"it has pruned shapes in features\.0, .* and \d+ more, which its config"):
        densify(model)


def test_what_a_configuration_has_no_place_for_is_refused(models: Callable[[str], nn.Module]) -> None:
    model: Any = models("resnet18")
    model.fc = nn.Linear(512, 9)
    with pytest.raises(ArtifactError, match="it is wider in fc, which its configuration cannot say"):
        densify(model)
    model = tiny_lm()
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=True)
    with pytest.raises(ArtifactError, match=r"it has more tensors in model\.layers\.0\.self_attn\.q_proj"):
        densify(model)
    model = models("resnet18")
    model.layer1[1] = nn.Identity()
    with pytest.raises(ArtifactError, match=r"it has layer1\.1, which its configuration cannot say"):
        densify(model)


def test_an_activation_inside_a_layer_is_refused() -> None:
    layer = Linear4bit.from_linear(nn.Linear(32, 4), activation="gelu")
    with pytest.raises(ArtifactError, match="module '0' applies 'gelu' itself, which an ordinary layer cannot"):
        dense_simulation(nn.Sequential(layer))
    with pytest.raises(ArtifactError, match="module 'the model itself' applies 'gelu'"):
        dense_simulation(layer)


def test_unknown_formats_are_refused(tmp_path: Path, models: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ArtifactError, match=r"unknown format 'dens': did you mean 'dense'\? Known: dense, pykd"):
        pykd.save_pretrained(models("bert"), tmp_path / "model", format="dens")
