"""transformers loads what pykd saved: in new processes, in both import orders, with any dtype, by pipelines too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification as AutoClassifier

import pykd
from pykd.errors import ArtifactError
from pykd.io import huggingface_plugin
from pykd.io.huggingface_plugin import PykdConfig
from pykd.io.import_hook import quantizer
from pykd.models.adapter import logits
from pykd.nn import CompressedModule

Variants = Callable[[str, str], nn.Module]
Batches = Callable[[str], dict[str, Tensor]]

IN_A_NEW_PROCESS = """
import pathlib, sys
root, order = pathlib.Path(sys.argv[1]), sys.argv[2]
if order == "transformers first":
    import transformers.quantizers.auto  # what its models need of torchvision may not import without pykd
    import pykd
else:
    import pykd
    assert "transformers" not in sys.modules and "torchvision" not in sys.modules
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from pykd.models.adapter import logits

count = 0
for folder in sorted(root.iterdir()):
    batch = load_file(folder / "batch.safetensors")
    expected = batch.pop("expected")
    loaders = [pykd.from_pretrained] if order == "pykd first" else []
    if folder.name.startswith("vit"):
        loaders.append(AutoModelForImageClassification.from_pretrained)
    elif not folder.name.startswith(("resnet", "mobilenet")):
        loaders.append(AutoModelForSequenceClassification.from_pretrained)
    for load in loaders:
        with torch.no_grad():
            found = logits(load(folder / "model"), batch)
        assert torch.equal(found, expected), (folder.name, (found - expected).abs().max())
        count += 1
print(count, "loaded")
"""


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, variants: Variants, batches: Batches) -> Path:
    """Every family in every form, with a batch and the logits of the model that was saved."""
    root = tmp_path_factory.mktemp("models")
    for family in ("bert", "distilbert", "vit", "resnet18", "mobilenet_v2"):
        for variant in ("plain", "pruned", "4bit", "8bit", "sparse", "sparse_4bit", "pruned_4bit"):
            model, batch = variants(family, variant), batches(family)
            model.pykd_report = [{"stage": variant}]  # type: ignore[assignment]
            folder = root / f"{family}_{variant}"
            pykd.save_pretrained(model, folder / "model")
            save_file({**batch, "expected": forward(model, batch)}, folder / "batch.safetensors")
    return root


@pytest.mark.parametrize(("order", "count"), [("pykd first", 35 + 21), ("transformers first", 21)])
def test_new_processes_compute_the_same_logits(order: str, count: int, folders: Path) -> None:
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(folders), order]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{count} loaded\n"


def test_stages_come_back(folders: Path) -> None:
    model = AutoClassifier.from_pretrained(folders / "bert_4bit" / "model")
    assert model.pykd_report == [{"stage": "4bit"}]


@pytest.mark.parametrize("variant", ["pruned", "4bit", "8bit", "sparse", "sparse_4bit"])
def test_another_dtype_converts_everything_but_packed_weights_and_scales(variant: str, folders: Path) -> None:
    path = folders / f"vit_{variant}" / "model"
    stored = {name: value.dtype for name, value in load_file(path / "model.safetensors").items()}
    model = AutoModelForImageClassification.from_pretrained(path, dtype=torch.bfloat16)
    packed = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, CompressedModule)
        for key in module.state_dict()
        if key not in dict(module.named_parameters())
    }
    assert bool(packed) == (variant != "pruned")
    for name, value in model.state_dict().items():
        assert value.dtype == (stored[name] if name in packed else torch.bfloat16), name
    batch = load_file(folders / f"vit_{variant}" / "batch.safetensors")
    expected = batch.pop("expected")
    found = forward(model, {name: value.to(torch.bfloat16) for name, value in batch.items()})
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_dtype_auto_keeps_what_was_saved(folders: Path, tmp_path: Path, variants: Variants) -> None:
    model = variants("vit", "4bit").to(torch.bfloat16)
    pykd.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model", dtype="auto")
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    wide = AutoModelForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert {m.dtype for m in wide.modules() if isinstance(m, CompressedModule)} == {torch.float32}


def test_save_pretrained_of_transformers_writes_the_structure_of_now(folders: Path, tmp_path: Path) -> None:
    model = AutoClassifier.from_pretrained(folders / "bert_pruned_4bit" / "model")
    feed_forward = model.bert.encoder.layer[1].intermediate
    feed_forward.dense = feed_forward.dense.to_dense()  # no longer what the folder's configuration says
    model.save_pretrained(tmp_path / "theirs")
    batch = load_file(folders / "bert_pruned_4bit" / "batch.safetensors")
    del batch["expected"]
    again = AutoClassifier.from_pretrained(tmp_path / "theirs")
    assert isinstance(again.bert.encoder.layer[1].intermediate.dense, nn.Linear)
    assert torch.equal(forward(again, batch), forward(model, batch))
    pykd.save_pretrained(again, tmp_path / "ours")
    assert torch.equal(forward(pykd.from_pretrained(tmp_path / "ours"), batch), forward(model, batch))


def test_loaded_models_may_be_converted_and_trained(folders: Path) -> None:
    model = AutoClassifier.from_pretrained(folders / "bert_sparse" / "model")
    assert not model.is_quantized
    batch = load_file(folders / "bert_sparse" / "batch.safetensors")
    del batch["expected"]
    model.train()(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    sparse = [module for module in model.modules() if isinstance(module, CompressedModule)]
    assert sparse
    assert all(module.values.grad is not None and module.values.grad.abs().sum() > 0 for module in sparse)
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("variant", ["pruned", "sparse_4bit"])
def test_other_heads_take_the_same_body(variant: str, folders: Path) -> None:
    path = folders / f"bert_{variant}" / "model"
    whole = AutoClassifier.from_pretrained(path)
    body = AutoModel.from_pretrained(path)
    other = AutoModelForMaskedLM.from_pretrained(path)
    for name, value in body.state_dict().items():
        assert torch.equal(value, whole.bert.state_dict()[name])
        if "pooler" not in name:
            assert torch.equal(value, other.bert.state_dict()[name])


def test_a_head_takes_a_body_that_was_saved_alone(folders: Path, tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(folders / "bert_pruned_4bit" / "model")
    pykd.save_pretrained(body, tmp_path / "body")
    whole = AutoClassifier.from_pretrained(tmp_path / "body")
    assert all(torch.equal(value, whole.bert.state_dict()[name]) for name, value in body.state_dict().items())


def test_pipelines(folders: Path, tmp_path: Path, variants: Variants) -> None:
    from transformers import BertTokenizer, ViTImageProcessor, pipeline

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    model = variants("bert", "pruned_4bit")
    folder = pykd.save_pretrained(model, tmp_path / "text", tokenizer=tokenizer)
    (answer,) = pipeline("text-classification", model=str(folder))("a b c x y z")
    scores = forward(model, dict(tokenizer("a b c x y z", return_tensors="pt"))).softmax(-1)[0]
    assert answer["label"] == f"LABEL_{scores.argmax()}"
    assert answer["score"] == pytest.approx(scores.max().item(), rel=1e-5)

    from PIL import Image

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model = variants("vit", "sparse_4bit")
    folder = pykd.save_pretrained(model, tmp_path / "image", processor=processor)
    image = Image.effect_noise((20, 20), 60).convert("RGB")
    best = pipeline("image-classification", model=str(folder))(image)[0]
    scores = forward(model, dict(processor(image, return_tensors="pt"))).softmax(-1)[0]
    assert best["score"] == pytest.approx(scores.max().item(), rel=1e-5)


def test_device_map(folders: Path) -> None:
    batch = load_file(folders / "bert_4bit" / "batch.safetensors")
    expected = batch.pop("expected")
    model = AutoClassifier.from_pretrained(folders / "bert_4bit" / "model", device_map="cpu")
    assert torch.equal(forward(model, batch), expected)


# Refusals.


@pytest.fixture
def damaged(folders: Path, tmp_path: Path) -> Path:
    for file in (folders / "bert_4bit" / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "pykd_manifest.json").unlink(missing_ok=True)


def test_checksums_are_verified_here_too(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is altered: expected sha256"):
        AutoClassifier.from_pretrained(damaged)
    weights.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"expected {len(data)} bytes, found {len(data) - 1}"):
        AutoClassifier.from_pretrained(damaged)
    (damaged / "pykd_manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read as safetensors"):
        AutoClassifier.from_pretrained(damaged)


def test_newer_formats(damaged: Path) -> None:
    edit(damaged, lambda content: content.update(format_version=2))
    with pytest.raises(ArtifactError, match=r"quantization_config in config\.json has format_version 2, which a newer"):
        AutoClassifier.from_pretrained(damaged)


def test_tensors_that_do_not_fit(damaged: Path) -> None:
    edit(damaged, lambda content: content["modules"]["bert.encoder.layer.0.output.dense"].update(group_size=16))
    with pytest.raises(
        ArtifactError, match=r"'bert\.encoder\.layer\.0\.output\.dense\.scales' should have shape \[32, 5\]"
    ):
        AutoClassifier.from_pretrained(damaged)
    edit(damaged, lambda content: content["modules"].pop("bert.encoder.layer.0.output.dense"))
    with pytest.raises(ArtifactError, match=r"output\.dense\.weight' should have shape .*found no such tensor"):
        AutoClassifier.from_pretrained(damaged)


def test_nothing_is_quantized_on_the_fly(folders: Path) -> None:
    config = PykdConfig(format_version=1, modules={}, attributes={})
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoClassifier.from_pretrained(folders / "bert_plain" / "model", quantization_config=config)


def test_a_transformers_without_a_registry_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.quantizers.auto.register_quantizer")
    monkeypatch.delitem(sys.modules, "pykd.io.huggingface_plugin")
    message = "pykd could not register its quantizer with this version of transformers"
    with pytest.warns(RuntimeWarning, match=message), quantizer():
        pass


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    huggingface_plugin.register()
    assert AUTO_QUANTIZER_MAPPING["pykd"] is huggingface_plugin.PykdQuantizer
