"""Pruning of real models: what goes, what stays, that it trains on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pykd import from_pretrained, save_pretrained
from pykd.data.bundle import DataBundle, stack
from pykd.models.torchvision import load_torchvision
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning import METHODS, Outcome, Request, prune
from pykd.pruning.options import OPTIONS
from pykd.training import finetune

TOKENS = torch.arange(3, 17).view(2, 7)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


IMAGES = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


# Unstructured.


def test_the_smallest_weights_of_all_layers_go() -> None:
    model = network()
    conv, linear = model[0].weight.detach().clone(), model[3].weight.detach().clone()
    together = torch.cat([conv.flatten(), linear.flatten()]).abs()
    threshold = together.sort().values[round(0.6 * len(together)) - 1]
    dense = nn.Sequential(*model)
    assert prune(model, sparsity=0.6) is model
    assert isinstance(model[0], SparseConv2d) and isinstance(model[3], SparseLinear) and type(model[5]) is nn.Linear
    assert torch.equal(model[0].weight, conv * (conv.abs() > threshold))
    assert torch.equal(model[3].weight, linear * (linear.abs() > threshold))
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 3)) == round(0.6 * len(together))
    (entry,) = model.pykd_report
    total = sum(p.numel() for p in dense.parameters())
    assert entry["stage"] == "prune" and entry["method"] == "magnitude" and entry["parameters"]["sparsity"] == 0.6
    assert entry["parameters_before"] == entry["parameters_after"]
    assert entry["nonzero_before"] - entry["nonzero_after"] == round(0.6 * len(together)) and total > 0
    assert entry["skipped"] == {"5": "output head"} and list(entry["changed"]) == ["0", "3"]
    json.dumps(entry, allow_nan=False)


def test_removed_weights_stay_removed_in_training() -> None:
    model = prune(network(), sparsity=0.7)
    zeros = [model[i].weight == 0 for i in (0, 3)]
    items = [{"pixel_values": image, "labels": i} for i, image in enumerate(IMAGES)]
    before = model[3].weight.detach().clone()
    finetune(model, DataBundle(items, items, stack, list("abcd"), "noise"), epochs=5, weight_decay=0.1, progress=False)
    assert all(bool((model[i].weight[zero] == 0).all()) for i, zero in zip((0, 3), zeros, strict=True))
    assert not torch.equal(model[3].weight, before)


def test_pruning_again_counts_what_is_gone() -> None:
    model = prune(prune(network(), sparsity=0.3), sparsity=0.6)
    weights = [model[i].weight for i in (0, 3)]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.6 * sum(w.numel() for w in weights))
    assert [entry["parameters"]["sparsity"] for entry in model.pykd_report] == [0.3, 0.6]


def test_layers_measure_how_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def tune(layer: nn.Module, rows: tuple[int, ...]) -> dict[str, Any]:
        asked.append(tuple(rows))
        return {"gain": 1.0, "note": "no gain here: computed dense"}

    monkeypatch.setattr(SparseLinear, "tune", tune)
    model = prune(network(), sparsity=0.5, rows=(1, 32))
    record = model.pykd_report[-1]
    assert record["parameters"]["rows"] == [1, 32] and asked == [(1, 32)]
    assert record["changed"]["3"]["note"] == "no gain here: computed dense" and "note" not in record["changed"]["0"]
    with pytest.raises(ValueError, match=r"rows is for layers that are sparse: it goes with method .*, not 'channels'"):
        prune(network(), method="channels", rows=(1,))


def test_a_layer_that_loses_nothing_stays_dense() -> None:
    model = network()
    model[0].weight.data += 100
    prune(model, sparsity=0.1)
    assert type(model[0]) is nn.Conv2d and isinstance(model[3], SparseLinear)
    assert model.pykd_report[0]["skipped"]["0"] == "none of its weights is among those that go"


def test_defaults_of_a_transformer() -> None:
    model = prune(bert(), sparsity=0.5)
    changed = model.pykd_report[0]["changed"]
    assert len(changed) == 2 * 6 and not any("embeddings" in name or "classifier" in name for name in changed)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding and type(model.classifier) is nn.Linear
    assert model(input_ids=TOKENS).logits.shape == (2, 3)


def test_include_and_exclude() -> None:
    model = prune(bert(), include=["bert.encoder.layer.0"], exclude=["*.query"])
    assert all(
        name.startswith("bert.encoder.layer.0") and "query" not in name for name in model.pykd_report[0]["changed"]
    )
    assert len(model.pykd_report[0]["changed"]) == 5


# Structured.


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_channels_of_torchvision_networks(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = load_torchvision(name, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    prune(model, "channels", 0.5, example={"pixel_values": images, "labels": torch.zeros(2)})
    entry = model.pykd_report[0]
    assert entry["parameters_after"] < 0.3 * entry["parameters_before"]
    items = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    finetune(model, DataBundle(items, items, stack, list("abcde"), "noise"), max_steps=2, progress=False)
    with torch.inference_mode():
        want = model.eval()(images)
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(images), want)


def test_channels_by_pattern() -> None:
    model = load_torchvision("resnet18", num_classes=5)
    prune(model, "channels", 0.5, include=["layer1.*.conv1", "layer2"], exclude=["layer2.1.conv1"])
    entry = model.pykd_report[0]
    assert entry["changed"] == {
        "layer1.0.conv1": [64, 32],
        "layer1.1.conv1": [64, 32],
        "layer2.0.conv1": [128, 64],
        "layer2.0.downsample.0, layer2.1.conv2, layer2.0.conv2": [128, 64],
    }
    assert entry["skipped"]["layer2.1.conv1"] == "excluded by 'layer2.1.conv1'"
    assert entry["skipped"]["conv1"] == "not included"


def test_heads_and_neurons(tmp_path: Any) -> None:
    model = prune(prune(bert(), "heads", 0.5), "neurons", 0.25)
    assert [entry["changed"] for entry in model.pykd_report] == [
        {f"bert.encoder.layer.{i}.attention": [4, 2] for i in (0, 1)},
        {f"bert.encoder.layer.{i}": [48, 36] for i in (0, 1)},
    ]
    assert model.config.intermediate_size == 36
    with torch.inference_mode():
        want = model(input_ids=TOKENS).logits
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(input_ids=TOKENS).logits, want)


def test_structure_then_weights(tmp_path: Any) -> None:
    model = prune(prune(bert(), "neurons", 0.5), "magnitude", 0.5)
    with torch.inference_mode():
        want = model(input_ids=TOKENS).logits
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(input_ids=TOKENS).logits, want)
    with pytest.raises(ValueError, match="no attention heads to remove: prune structure before weights are made"):
        prune(model, "heads")


def test_blocks_by_pattern() -> None:
    model = prune(bert(), "heads", 0.5, exclude=["bert.encoder.layer.1"])
    entry = model.pykd_report[0]
    assert entry["changed"] == {"bert.encoder.layer.0.attention": [4, 2]}
    assert entry["skipped"] == {"bert.encoder.layer.1.attention": "excluded by 'bert.encoder.layer.1'"}
    assert model.config.num_attention_heads == 4
    with pytest.raises(ValueError, match=r"no feed-forward neurons to remove \(blocks: bert.encoder.layer.0, "):
        prune(bert(), "neurons", include=["nothing"])


# The verb.


def test_a_function_is_a_method() -> None:
    def nothing(model: nn.Module, request: Request) -> Outcome:
        return Outcome(skipped={"all": f"asked for {request.sparsity}"})

    model = prune(network(), nothing, 0.25)
    assert model.pykd_report[0]["method"] == "nothing" and model.pykd_report[0]["skipped"] == {"all": "asked for 0.25"}
    assert list(METHODS) == list(OPTIONS)


def test_what_it_refuses() -> None:
    model = network()
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="sparsity is the share removed, at least 0 and below 1"):
            prune(model, sparsity=sparsity)
    with pytest.raises(ValueError, match="unknown method 'magnitud': did you mean 'magnitude'"):
        prune(model, "magnitud")
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the model's '3\.weight' holds NaN or infinite values"):
        prune(model)
    assert not hasattr(model, "pykd_report") and type(model[0]) is nn.Conv2d


# Whole layers.


def bert_of(layers: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **shape)).eval()


def test_layers_are_removed_whole_and_the_map_follows(tmp_path: Path) -> None:
    import pykd
    from pykd.models.layers import layer_map
    from pykd.models.students import derive

    student = derive(bert_of(8), layers=[0, 1, 3, 5, 6, 7])
    prune(student, method="layers", sparsity=0.5)
    entry = student.pykd_report[-1]
    assert entry["changed"] == {"bert.encoder.layer": [6, 3]} and student.config.num_hidden_layers == 3
    assert layer_map(student) == {"bert.encoder.layer": [0, 3, 7]}
    pykd.save_pretrained(student, tmp_path / "model")
    again = pykd.from_pretrained(tmp_path / "model")
    assert layer_map(again) == layer_map(student)
    ids = torch.arange(3, 9).view(1, 6)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)


def test_layers_that_stay() -> None:
    model = bert_of(6)
    prune(model, method="layers", sparsity=0.75, exclude=["bert.encoder.layer.[01]"])
    assert model.pykd_layer_map == {"bert.encoder.layer": [0, 1, 2]}
    assert list(model.pykd_report[-1]["skipped"]) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    with pytest.raises(ValueError, match=r"Linear has no layers to remove \(stacks: none found\)"):
        prune(nn.Linear(2, 2), method="layers")
    with pytest.raises(ValueError, match=r"no layers to remove \(stacks: bert.encoder.layer\): widen"):
        prune(bert_of(2), method="layers", include=["decoder.*"])
