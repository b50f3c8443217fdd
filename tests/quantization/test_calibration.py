"""Calibration on real models: who is reached, in which order, behind what, with how much memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import from_pretrained, save_pretrained
from pykd.calibration import calibrate, calibration_batches, layers
from pykd.data.bundle import DataBundle, stack
from pykd.errors import DataError
from pykd.models.torchvision import load_torchvision
from pykd.nn import CompressedModule, Conv2d4bit, Linear4bit
from pykd.nn.codecs.four_bit import FourBit
from pykd.pruning import prune
from pykd.quantization import METHODS, Inputs, quantize
from pykd.quantization.rtn import rtn

CALIBRATED = [name for name, method in METHODS.items() if method.calibrated]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 67}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **shape)).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return load_torchvision("resnet18", num_classes=4).eval()


def texts(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (count, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(4, 13, (count, 1), generator=generator)).long()
    return [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(8), mask.split(8), strict=True)]


def images(size: int = 16) -> list[dict[str, Tensor]]:
    pixels = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": part} for part in pixels.split(8)]


#: Method -> share of the error of plain rounding that it may leave in the logits.
CLOSER = {"gptq": 0.75, "awq": 0.95}
MODELS = {"bert": (bert, texts), "vit": (vit, images)}


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_closer_than_by_plain_rounding_and_reloads(name: str, method: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    error = {}
    with torch.no_grad():
        want = torch.cat([make()(**batch).logits for batch in data()])
        for choice in ("rtn", method):
            model = quantize(make(), method=choice, data=data(), group_size=16)
            found = torch.cat([model(**batch).logits for batch in data()])
            error[choice] = float((found - want).norm())
        assert error[method] < CLOSER[method] * error["rtn"]
        save_pretrained(model, tmp_path / "model")
        again = from_pretrained(tmp_path / "model").eval()
        assert torch.equal(torch.cat([again(**batch).logits for batch in data()]), found)
    entry = model.pykd_report[0]
    assert entry["method"] == method and entry["parameters"]["samples"] == sum(
        len(next(iter(batch.values()))) for batch in data()
    )
    assert len(entry["changed"]) >= 12
    assert all("output head" in reason or "embeddings" in name for name, reason in entry["skipped"].items())


@pytest.mark.parametrize("method", METHODS)
def test_pruned_models_keep_their_pattern(method: str) -> None:
    model = prune(bert(), sparsity=0.6)
    masks = {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, CompressedModule)}
    assert len(masks) >= 12
    for symmetric in (True, False):
        quantize(model, method=method, data=texts(), symmetric=symmetric, group_size=20)
        for name, zero in masks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, Linear4bit) and bool((layer.weight[zero] == 0).all()), name
        model = prune(bert(), sparsity=0.6)


def test_a_convolutional_network() -> None:
    model = quantize(resnet(), method="gptq", data=images(32), include=["layer2.0.downsample", "conv1"])
    assert list(model.pykd_report[0]["changed"]) == ["conv1", "layer2.0.downsample.0"]
    assert isinstance(model.layer2[0].downsample[0], Conv2d4bit)


def test_layers_run_in_order_behind_the_packed_ones() -> None:
    """The names are registered backwards; the second layer must see what the first, packed, gives it."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(32, 48), nn.Linear(24, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    seen: list[Tensor] = []

    def watch(weight: Tensor, inputs: Inputs, *, code: str, group_size: int) -> FourBit:
        seen.append(inputs.hessian[0])
        return rtn(weight, code=code, group_size=group_size)

    model, x = Backwards(), torch.randn(20, 24)
    quantize(model, method=watch, data=[x], include=["first", "second"], group_size=8)
    assert model.pykd_report[0]["method"] == "watch"
    assert list(model.pykd_report[0]["changed"]) == ["first", "second"]
    torch.testing.assert_close(seen[0], x.T @ x / 10)
    with torch.no_grad():
        between = model.first(x)
    torch.testing.assert_close(seen[1], between.T @ between / 10)


def test_one_hessian_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's statistics begin, those of all earlier ones are gone; q, k and v share theirs."""
    alive: list[weakref.ref[Tensor]] = []
    begun = 0

    class Watched(layers.Accumulator):
        def __init__(self, layer: nn.Module, **collected: bool) -> None:
            nonlocal begun
            assert [ref for ref in alive if ref() is not None] == []
            super().__init__(layer, **collected)
            alive.append(weakref.ref(self.products))
            begun += 1

    monkeypatch.setattr(layers, "Accumulator", Watched)
    model = quantize(bert(), method="gptq", data=texts(8), group_size=16)
    assert len(model.pykd_report[0]["changed"]) == 13 and begun == 9


def test_shared_layers_see_every_call_and_forward_stops_early() -> None:
    calls = 0

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.tail = nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            for _ in range(3):
                x = self.step(x)
            calls += 1
            return self.tail(x)

    rows: dict[str, int] = {}
    unreached = calibrate(
        Loop(), ["step"], [{"pixel_values": torch.randn(5, 32)}], lambda name, inputs: rows.update({name: inputs.rows})
    )
    assert rows == {"step": 15} and unreached == [] and calls == 1  # the survey alone ran to the end


def test_layers_that_data_never_reaches_are_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.idle(x) if x.sum() > 1e9 else self.used(x))

    model = quantize(Gated(), method="gptq", data=[torch.randn(8, 64)])
    entry = model.pykd_report[0]
    assert type(model.idle) is nn.Linear and list(entry["changed"]) == ["used"]
    assert entry["skipped"]["idle"].startswith("calibration never reached it: give data that uses it, or quantize")
    with pytest.raises(ValueError, match="calibration reached none of 1 layers: give data="):
        quantize(Gated(), method="gptq", data=[torch.randn(8, 64)], include=["idle"])


def test_the_model_is_left_as_it_was() -> None:
    model = bert().train()
    model.bert.pooler.eval()
    training = {name: module.training for name, module in model.named_modules()}
    quantize(model, method="gptq", data=texts(8), include=["bert.encoder.layer.0.attention"], group_size=16)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_a_bundle_gives_seeded_examples() -> None:
    items = [{"pixel_values": torch.full((3,), float(index)), "labels": index % 2} for index in range(30)]
    bundle = DataBundle(train=items, test=items[:2], collate=stack, class_names=("a", "b"), name="tiny")

    def drawn(seed: int) -> list[float]:
        batches = calibration_batches(bundle, samples=10, batch_size=4, seed=seed)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        return [value for batch in batches for value in batch["pixel_values"][:, 0].tolist()]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(calibration_batches(bundle, samples=99, batch_size=99)[0]["labels"]) == 30


@pytest.mark.parametrize("method", CALIBRATED)
def test_the_same_twice(method: str) -> None:
    states = [quantize(bert(), "nf4", method=method, data=texts(), group_size=16).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def empty() -> Iterator[Any]:
    return iter(())


def test_what_it_refuses() -> None:
    model = bert()
    with pytest.raises(DataError, match="method 'gptq' looks at the inputs of each layer: pass data="):
        quantize(model, method="gptq")
    for name in ("samples", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} is a number of examples, at least 1, got 0"):
            quantize(model, method="gptq", data=texts(), **{name: 0})
    with pytest.raises(DataError, match="data must be a DataBundle or a list or loader of batches, got Tensor"):
        quantize(model, method="gptq", data=torch.zeros(3))
    with pytest.raises(DataError, match="a batch is a tensor or a dict of tensors by input name, got int"):
        quantize(model, method="gptq", data=[3])
    with pytest.raises(DataError, match="data holds no batches"):
        quantize(model, method="gptq", data=empty())
    broken = [torch.full((4, 64), torch.nan)]
    with pytest.raises(ValueError, match="calibration gives layer '0' NaN or infinite inputs: look at the data"):
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), method="gptq", data=broken)
    with pytest.raises(ValueError, match="unknown method 'gtpq': did you mean 'gptq'"):
        quantize(model, method="gtpq")
    with pytest.raises(ValueError, match="method 'gptq' chooses 4-bit codes, and scheme 'w8a8' has none: use method="):
        quantize(model, "w8a8", method="gptq", data=texts())
    with pytest.raises(ValueError, match=r"symmetric=False stores zero points of schemes .*, got scheme 'nf4'"):
        quantize(model, "nf4", symmetric=False)
    assert not hasattr(model, "pykd_report")
