"""A saved model comes back with the same logits, and its file is smaller by what compression saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pykd
from pykd.errors import ArtifactError, ModelLoadError
from pykd.io.manifest import write_manifest
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule

Models = Callable[[str], nn.Module]
Variants = Callable[[str, str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]
VARIANTS = ["plain", "pruned", "4bit", "8bit", "sparse", "sparse_formats", "sparse_4bit", "pruned_4bit"]


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


def payload(folder: Path) -> int:
    """Bytes of model.safetensors without its header, which is JSON after its own length in eight bytes."""
    with open(folder / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return (folder / "model.safetensors").stat().st_size - 8 - header


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "mobilenet_v2"])  # the others: in new processes, test_huggingface_plugin
def test_logits_are_identical(family: str, variant: str, tmp_path: Path, variants: Variants, batches: Batches) -> None:
    model, batch = variants(family, variant), batches(family)
    expected = forward(model, batch)
    state = torch.get_rng_state()
    pykd.save_pretrained(model, tmp_path / "model")
    assert torch.equal(state, torch.get_rng_state()), "saving must not touch the random state"
    loaded = pykd.from_pretrained(tmp_path / "model")
    assert torch.equal(state, torch.get_rng_state()), "loading must not touch the random state"
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(forward(loaded, batch), expected)
    assert torch.equal(forward(model, batch), expected), "saving must not change the model"
    again = copy.deepcopy(loaded)
    pykd.save_pretrained(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def stored_bytes(weight: Tensor, variant: str) -> int:
    """What the weight of a linear layer takes in each form, from the description of the format."""
    rows, columns = weight.shape
    kept = int(weight.count_nonzero())
    scales, mask = 2 * rows * -(-columns // 32), rows * -(-columns // 8)
    sizes = {
        "4bit": rows * -(-columns // 2) + scales,
        "8bit": rows * columns + 4 * rows,
        "sparse": mask + 4 * kept,
        "sparse_4bit": min(rows * -(-columns // 2), mask + -(-kept // 2)) + scales,
    }
    return sizes[variant]


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("variant", ["4bit", "8bit", "sparse", "sparse_4bit"])
def test_the_file_shrinks_by_what_was_saved(
    family: str, variant: str, tmp_path: Path, models: Models, variants: Variants
) -> None:
    dense, model = models(family), variants(family, variant)
    pykd.save_pretrained(dense, tmp_path / "dense")
    pykd.save_pretrained(model, tmp_path / "model")
    layers = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, CompressedModule)}
    assert len(layers) == 12
    saved = sum(4 * weight.numel() - stored_bytes(weight, variant) for weight in layers.values())
    assert payload(tmp_path / "dense") - payload(tmp_path / "model") == saved > 0.5 * payload(tmp_path / "model")


def test_pruned_files_hold_no_more_than_the_parameters(tmp_path: Path, variants: Variants) -> None:
    for family in ("distilbert", "resnet18"):
        pykd.save_pretrained(variants(family, "plain"), tmp_path / family / "plain")
        model = variants(family, "pruned")
        pykd.save_pretrained(model, tmp_path / family / "pruned")
        size = sum(value.nbytes for value in model.state_dict().values())
        assert payload(tmp_path / family / "pruned") == size < payload(tmp_path / family / "plain")


def test_a_plain_model_needs_no_pykd_to_load(tmp_path: Path, models: Models) -> None:
    pykd.save_pretrained(models("bert"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_report_and_provenance_come_back(tmp_path: Path, models: Models) -> None:
    for family in ("bert", "mobilenet_v2"):
        model: Any = models(family)
        model.pykd_report = [{"stage": "prune", "sparsity": 0.5, "skipped": {"fc": "last layer"}}]
        folder = pykd.save_pretrained(model, tmp_path / family, provenance={"teacher": "resnet18"})
        loaded: Any = pykd.from_pretrained(folder)
        assert loaded.pykd_report == model.pykd_report
        manifest = json.loads((folder / "pykd_manifest.json").read_text())
        assert manifest["provenance"] == {"teacher": "resnet18"}
        assert set(manifest["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert loaded.pykd_origin == model.pykd_origin


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    config = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 20}
    model: Any = load_huggingface(None, "masked-lm", config=config).eval()
    pykd.save_pretrained(model, tmp_path / "tied")
    loaded: Any = pykd.from_pretrained(tmp_path / "tied")
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    # A tie that the configuration promises and the model no longer has, and one that only the model has.
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach() + 1)
    model.bert.encoder.layer[0].attention.self.key.weight = model.bert.encoder.layer[0].attention.self.query.weight
    batch = {"input_ids": torch.arange(10)[None]}
    pykd.save_pretrained(model, tmp_path / "untied")
    loaded = pykd.from_pretrained(tmp_path / "untied")
    attention = loaded.bert.encoder.layer[0].attention.self
    assert attention.key.weight is attention.query.weight
    assert loaded.cls.predictions.decoder.weight is not loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(forward(loaded, batch), forward(model, batch))


def test_ties_between_torchvision_layers_survive(tmp_path: Path) -> None:
    model: Any = load_torchvision("resnet18", 5).eval()
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    pykd.save_pretrained(model, tmp_path / "model")
    loaded: Any = pykd.from_pretrained(tmp_path / "model")
    assert loaded.layer1[1].conv1.weight is loaded.layer1[0].conv1.weight


@pytest.mark.parametrize("family", ["vit", "resnet18"])
def test_every_tensor_keeps_its_dtype(family: str, tmp_path: Path, models: Models) -> None:
    model = models(family).to(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    layers[-1].float()
    pykd.save_pretrained(model, tmp_path / "model")
    loaded = pykd.from_pretrained(tmp_path / "model")
    expected = {name: value.dtype for name, value in model.state_dict().items()}
    assert len(set(expected.values())) >= 2
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == expected


@pytest.mark.parametrize("name", ["regnet_y_400mf", "mnasnet0_5"])
def test_architectures_that_want_more_than_their_tensors(name: str, tmp_path: Path) -> None:
    """One cannot be built on the meta device, the other asks a state dict for the version of its layers."""
    images = {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = load_torchvision(name, 4).eval()
    pykd.save_pretrained(model, tmp_path / "model")
    assert torch.equal(forward(pykd.from_pretrained(tmp_path / "model"), images), forward(model, images))


def test_removed_layers_stay_removed(tmp_path: Path, models: Models, batches: Batches) -> None:
    for family, stack in {"bert": "bert.encoder.layer", "resnet18": "layer3"}.items():
        model = models(family)
        del model.get_submodule(stack)[1:]  # type: ignore[index]
        pykd.save_pretrained(model, tmp_path / family)
        loaded = pykd.from_pretrained(tmp_path / family)
        assert len(loaded.get_submodule(stack)) == 1  # type: ignore[arg-type]
        assert torch.equal(forward(loaded, batches(family)), forward(model, batches(family)))


class Companion:
    """Anything with the method that tokenizers and processors have."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "vocab.txt").write_text("a\nb\n")


def test_companions_are_saved_and_checked(tmp_path: Path, models: Models) -> None:
    pykd.save_pretrained(models("resnet18"), tmp_path / "model", tokenizer=Companion(), processor=Companion())
    (tmp_path / "model" / "vocab.txt").write_text("a\nc\n")
    with pytest.raises(ArtifactError, match=r"vocab\.txt is altered"):
        pykd.from_pretrained(tmp_path / "model")


# Refusals.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "model"
    return pykd.save_pretrained(load_torchvision("squeezenet1_1", 3), path)


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in pristine.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def seal(folder: Path) -> None:
    """Give the folder a manifest that fits what is in it now: damage beyond checksums must be found too."""
    (folder / "pykd_manifest.json").unlink()
    write_manifest(folder, provenance={}, stages=[])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["pykd"] = {**content["pykd"], **changes.pop("pykd", {})}
    path.write_text(json.dumps({**content, **changes}))
    seal(folder)


def test_truncated_and_tampered_files_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is altered: expected sha256 \w{64}, found \w{64}"):
        pykd.from_pretrained(saved)
    weights.write_bytes(data[:-7])
    with pytest.raises(
        ArtifactError, match=rf"truncated or altered: expected {len(data)} bytes, found {len(data) - 7};"
    ):
        pykd.from_pretrained(saved)
    seal(saved)
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read as safetensors"):
        pykd.from_pretrained(saved)


def test_newer_and_unknown_formats(saved: Path) -> None:
    edit_config(saved, pykd={"format_version": 9})
    with pytest.raises(ArtifactError, match=r"config\.json has format_version 9, which a newer pykd wrote"):
        pykd.from_pretrained(saved)
    edit_config(saved, pykd={"format_version": 1, "layers": {}})
    with pytest.raises(ArtifactError, match="unknown key 'layers'"):
        pykd.from_pretrained(saved)


def test_configurations_that_do_not_fit(saved: Path) -> None:
    edit_config(saved, pykd={"modules": {"classifier.1": {"type": "Identity"}}})
    with pytest.raises(
        ArtifactError, match=r"does not fit .*0 tensors missing, 2 unknown \(first: 'classifier\.1\.bias'"
    ):
        pykd.from_pretrained(saved)
    edit_config(saved, pykd={"modules": {"classifier.0": {"type": "Linear", "in_features": 1, "out_features": 1}}})
    with pytest.raises(ArtifactError, match=r"2 tensors missing, 0 unknown"):
        pykd.from_pretrained(saved)
    wide = {"type": "Conv2d", "in_channels": 512, "out_channels": 4, "kernel_size": [1, 1]}
    edit_config(saved, pykd={"modules": {"classifier.1": wide}})
    with pytest.raises(ArtifactError, match=r"does not fit .*size mismatch for classifier\.1"):
        pykd.from_pretrained(saved)
    edit_config(saved, pykd={"modules": {}}, origin={"source": "elsewhere"})
    with pytest.raises(ArtifactError, match="does not say which torchvision model it is; found the origin"):
        pykd.from_pretrained(saved)
    edit_config(saved, origin={"source": "torchvision", "name": "resnet-18", "kwargs": {}})
    with pytest.raises(ModelLoadError, match="'resnet-18' cannot be built"):
        pykd.from_pretrained(saved)


def test_unreadable_configurations(saved: Path) -> None:
    (saved / "config.json").write_text("[")
    seal(saved)
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read as JSON"):
        pykd.from_pretrained(saved)
    (saved / "config.json").write_text("[]")
    seal(saved)
    with pytest.raises(ArtifactError, match=r"config\.json holds no JSON object"):
        pykd.from_pretrained(saved)
    (saved / "config.json").write_text('{"architectures": ["ViTForEverything"]}')
    seal(saved)
    with pytest.raises(ArtifactError, match=r"names the architecture 'ViTForEverything', which transformers \d"):
        pykd.from_pretrained(saved)


def test_paths_that_are_no_saved_models(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a folder\. pykd\.from_pretrained loads what"):
        pykd.from_pretrained(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"has no pykd_manifest\.json"):
        pykd.from_pretrained(tmp_path)


def test_where_a_model_may_be_saved(saved: Path) -> None:
    model: Any = load_torchvision("squeezenet1_1", 3)
    nn.init.constant_(model.classifier[1].bias, 2.0)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ArtifactError, match="already holds a saved model; pass overwrite=True"):
        pykd.save_pretrained(model, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    pykd.save_pretrained(model, saved, overwrite=True)
    assert (saved / "model.safetensors").read_bytes() != before["model.safetensors"]
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"did not write there \(notes\.txt\)"):
        pykd.save_pretrained(model, saved, overwrite=True)


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="neither a model of transformers nor carries pykd_origin"):
        pykd.save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    model: Any = load_torchvision("squeezenet1_1", 3)
    model.register_buffer("extra", torch.zeros(2))
    with pytest.raises(ArtifactError, match=r"tensor 'extra' of shape \(2,\) would not reload: .*has nothing there"):
        pykd.save_pretrained(model, tmp_path / "model")
    model = load_torchvision("resnet18", 3)
    model.bn1.register_buffer("num_batches_tracked", None)
    with pytest.raises(
        ArtifactError, match=r"'bn1\.num_batches_tracked' of the model's configuration is not in the model"
    ):
        pykd.save_pretrained(model, tmp_path / "model")
    model = load_torchvision("resnet18", 3)
    type(model).get_extra_state = lambda self: {"anything": 1}
    try:
        with pytest.raises(
            ArtifactError, match="'_extra_state' in the model's state is a dict; only tensors are saved"
        ):
            pykd.save_pretrained(model, tmp_path / "model")
    finally:
        del type(model).get_extra_state
    model = load_torchvision("squeezenet1_1", 3)
    model.pykd_report = [{"accuracy": torch.tensor(0.5)}]
    with pytest.raises(ArtifactError, match=r"provenance and model\.pykd_report must hold JSON values only"):
        pykd.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert list(tmp_path.iterdir()) == []
