"""prepare_qat, training, convert_qat: on real models, with the verbs that train, interrupted and resumed, by recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import from_pretrained, save_pretrained
from pykd.data.bundle import DataBundle, stack
from pykd.distillation import distill
from pykd.errors import ArtifactError
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule, Linear4bit, QATLinear
from pykd.nn.fake_quantized import FakeQuantized
from pykd.pipeline.progressive import quantize_progressively
from pykd.pipeline.stages import Context, apply_stage
from pykd.pruning import prune
from pykd.quantization import QAT_SCHEMES, convert_qat, prepare_qat, quantize
from pykd.recipe import load_recipe
from pykd.training import finetune

IDS = torch.arange(3, 17).view(2, 7)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()


def texts() -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(36):
        ids = torch.randint(5, 50, (7,), generator=generator)
        items.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 3})
        ids[:2] = index % 3
    return DataBundle(items, items, stack, ["a", "b", "c"], "tokens")


@torch.no_grad()
def forward(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What each layer computes with, before and after `convert_qat`."""
    found = {name: module.rounded() for name, module in model.named_modules() if isinstance(module, FakeQuantized)}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}
    return found | {name: module.dequantize() for name, module in packed.items()}


@pytest.mark.parametrize("scheme", QAT_SCHEMES)
def test_train_convert_and_reload(scheme: str, tmp_path: Path) -> None:
    model = bert()
    assert prepare_qat(model, scheme, group_size=16) is model
    finetune(model, texts(), epochs=3, lr=3e-3, batch_size=12, progress=False)
    trained, before = weights(model), forward(model)
    assert len(trained) == 7
    assert convert_qat(model) is model
    assert not [module for module in model.modules() if isinstance(module, FakeQuantized)]
    packed = weights(model)
    assert all(torch.equal(trained[name], packed[name]) for name in trained) and len(packed) == 7
    tolerance = 2e-2 if scheme.endswith("a8") else 1e-4  # a rounded activation may fall to the other side
    torch.testing.assert_close(forward(model), before, rtol=tolerance, atol=tolerance)
    prepared, _, entry = model.pykd_report
    assert prepared["stage"] == "prepare_qat" and prepared["skipped"]["classifier"] == "output head"
    assert prepared["changed"] == list(trained) == list(entry["changed"])
    assert entry["stage"] == "quantize" and entry["method"] == "qat" and entry["parameters"]["scheme"] == scheme
    assert entry["parameters_before"] == entry["parameters_after"]
    assert all(facts["bytes_before"] > facts["bytes_after"] for facts in entry["changed"].values())
    json.dumps(model.pykd_report, allow_nan=False)
    quantize(model, embeddings="w8a16", include=["*embeddings*"])
    want = forward(model)
    save_pretrained(model, tmp_path / "model")
    assert torch.equal(forward(from_pretrained(tmp_path / "model")), want)


def test_training_wins_back_what_rounding_lost() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)
    rows = torch.randn(512, 16)
    items = [{"pixel_values": row, "labels": index % 4} for index, row in enumerate(rows)]
    data = DataBundle(items, items, stack, list("abcd"), "rows")
    want = teacher(rows).detach().log_softmax(1)

    def divergence(model: nn.Module) -> float:
        got = model(rows).detach().log_softmax(1)
        return float((want.exp() * (want - got)).sum(1).mean())

    plain = quantize(copy.deepcopy(teacher), "w4a16", group_size=64)
    trained = prepare_qat(copy.deepcopy(teacher), "w4a16", group_size=64, search_every=10)
    distill(trained, teacher, data, epochs=15, lr=1e-3, alpha=1.0, temperature=1.0, progress=False)
    assert divergence(convert_qat(trained)) < 0.6 * divergence(plain)


def test_an_interrupted_training_continues_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "batch_size": 12, "progress": False}
    whole = finetune(prepare_qat(bert(), search_every=5), texts(), **options)

    partly = prepare_qat(bert(), search_every=5)
    steps = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal steps
        steps += 1
        if steps == 9:  # after the checkpoint of step 7, before that of the end
            raise KeyboardInterrupt

    handle = partly.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        finetune(partly, texts(), checkpoint_dir=tmp_path, checkpoint_steps=7, **options)
    handle.remove()
    again = prepare_qat(bert(), search_every=5)
    finetune(again, texts(), checkpoint_dir=tmp_path, checkpoint_steps=7, resume=True, **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))


def test_pruned_layers_stay_pruned_and_are_stored_sparse() -> None:
    model = prune(bert(), sparsity=0.75)
    masks = {name: module.weight != 0 for name, module in model.named_modules() if isinstance(module, CompressedModule)}
    prepare_qat(model, "w4a16", group_size=16)
    finetune(model, texts(), epochs=2, lr=3e-3, batch_size=12, progress=False)
    convert_qat(model)
    for name, kept in masks.items():
        layer = model.get_submodule(name)
        assert bool((layer.weight[~kept] == 0).all()) and "bitmask" in layer.state_dict(), name


def test_convolutional_networks() -> None:
    torch.manual_seed(0)
    model = load_torchvision("squeezenet1_1", num_classes=3).eval()
    prepare_qat(model, "w8a8", include=["features.3", "features.4"])
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = model(images)
        convert_qat(model)
        torch.testing.assert_close(model(images), before, rtol=1e-2, atol=1e-2)
    assert len(model.pykd_report[-1]["changed"]) == 6


def test_a_recipe_stage(tmp_path: Path) -> None:
    recipe = load_recipe(
        {
            "name": "qat",
            "data": {"kind": "digits"},
            "teacher": {"source": "huggingface", "name": "somewhere"},
            "stages": [{"qat": {"scheme": "nf4", "group_size": 16, "epochs": 1, "search_every": 2}}],
        }
    )
    context = Context(recipe, texts(), bert(), tmp_path, False, "1-qat")
    model = apply_stage(recipe.stages[0], bert(), context)
    stages = [entry["stage"] for entry in model.pykd_report]
    assert stages == ["prepare_qat", "distill", "quantize"] and not isinstance(model, QATLinear)
    assert model.bert.encoder.layer[0].intermediate.dense.scheme == "nf4"


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown scheme for quantization-aware training 'nf5': did you mean 'nf4'"):
        prepare_qat(bert(), "nf5")
    with pytest.raises(ValueError, match="group_size is the number of inputs that share a scale, at least 1, got 0"):
        prepare_qat(bert(), group_size=0)
    with pytest.raises(
        ValueError, match="symmetric=False stores zero points of schemes 'w4a16' and 'w4a8', got scheme 'nf4'"
    ):
        prepare_qat(bert(), "nf4", symmetric=False)
    with pytest.raises(ValueError, match=r"search_every is a number of forward passes, at least 1, got 0\.5"):
        prepare_qat(bert(), search_every=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no layer prepared for quantization-aware training: call prepare_qat"):
        convert_qat(bert())
    small = prepare_qat(nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Linear(4, 4)))
    assert type(small[0]) is nn.Linear and "no gain" in small.pykd_report[0]["skipped"]["0"]
    with pytest.raises(ArtifactError, match="is a QATLinear, where the model's configuration has Linear"):
        save_pretrained(prepare_qat(bert()), tmp_path / "model")


def test_a_packed_model_trains_on_in_fewer_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned weights stay zero through 16, 8 and 4 bits; each step starts from the numbers of the one before."""
    monkeypatch.setattr("pykd.quantization.qat.LEAST_SAVING_BYTES", 1)  # these layers are tiny
    model = prune(bert(), sparsity=0.6)
    zero = {name: m.weight == 0 for name, m in model.named_modules() if isinstance(m, CompressedModule)}
    for scheme in ("bf16", "w8a8", "w4a16"):
        before = weights(model)
        prepare_qat(model, scheme, group_size=16)
        inside = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantized)}
        assert len(inside) == 7 and {module.scheme for module in inside.values()} == {scheme}
        assert all(torch.equal(inside[name].weight, before[name]) for name in set(inside) & set(before))
        finetune(model, texts(), epochs=1, lr=3e-3, batch_size=12, progress=False)
        convert_qat(model)
    found = weights(model)
    assert all(bool((found[name][mask] == 0).all()) for name, mask in zero.items())
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert packed == set(inside)
    prepare_qat(model, "w8a16", group_size=16)  # more bytes than now: nothing to gain
    assert "no gain" in model.pykd_report[-1]["skipped"]["bert.encoder.layer.0.output.dense"]


def test_progressively_is_one_call(tmp_path: Path) -> None:
    teacher = bert()
    finetune(teacher, texts(), epochs=2, lr=3e-3, batch_size=12, progress=False)
    options: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "batch_size": 12, "progress": False, "group_size": 16}
    student = quantize_progressively(copy.deepcopy(teacher), teacher, texts(), **options)
    stages = [(entry["stage"], entry["parameters"].get("scheme")) for entry in student.pykd_report[1:]]
    steps = [("prepare_qat", None), ("distill", None), ("quantize", None)]
    assert [stage for stage, _ in stages] == [stage for stage, _ in steps] * 3
    assert [scheme for stage, scheme in stages if stage == "quantize"] == ["bf16", "w8a16", "w4a16"]
    want = forward(student)
    save_pretrained(student, tmp_path / "model")
    assert torch.equal(forward(from_pretrained(tmp_path / "model")), want)
    with pytest.raises(ValueError, match="schemes names no step: give schemes of fewer and fewer bits"):
        quantize_progressively(student, teacher, texts(), [])


def test_structured_pruning_and_training_in_few_bits() -> None:
    teacher = bert()
    for method in ("heads", "neurons"):
        model = prune(copy.deepcopy(teacher), method, sparsity=0.5)
        prepare_qat(model, "w8a8")
        distill(model, teacher, texts(), epochs=1, lr=1e-3, batch_size=12, progress=False)
        before = forward(model)
        torch.testing.assert_close(forward(convert_qat(model)), before, rtol=2e-2, atol=2e-2)
