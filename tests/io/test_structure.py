"""The difference between a model and its skeleton, applied to another skeleton, gives the model's structure."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pykd.errors import ArtifactError
from pykd.io import structure
from pykd.io.layers import build, describe
from pykd.io.structure import Structure


class Attention(nn.Module):
    """A container with what containers have: integers that forward uses, a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.window: tuple[int, ...] = (2, 2)
        self.groups: int | None = None
        self.scale = 0.5
        self.gate = nn.Parameter(torch.ones(4))
        self.register_buffer("index", torch.zeros(4, 4, dtype=torch.int64), persistent=True)
        self.proj = nn.Linear(8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def skeleton() -> Net:
    with torch.device("meta"):
        return Net()


def signature(model: nn.Module) -> dict[str, Any]:
    """Everything that a structure must carry over."""
    modules = {name: (type(module).__name__, describe(module)) for name, module in model.named_modules()}
    shapes = {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    numbers = {
        name: (module.num_heads, module.window, module.groups)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    }
    return {"modules": modules, "shapes": shapes, "numbers": numbers}


def round_trip(model: nn.Module) -> nn.Module:
    found = structure.difference(model, skeleton())
    again = Structure.from_dict(json.loads(json.dumps(found.to_dict())))
    fresh = skeleton()
    structure.apply(fresh, again)
    return fresh


widths = st.integers(1, 12)


@st.composite
def edited(draw: st.DrawFn) -> Net:
    """A Net with some of its layers pruned, replaced or removed."""
    with torch.device("meta"):
        model = Net()
        if draw(st.booleans()):
            model.embed = nn.Embedding(draw(widths), draw(widths), padding_idx=0)
        if draw(st.booleans()):
            channels = 2 * draw(widths)
            model.conv = nn.Conv2d(
                channels, channels, draw(st.sampled_from([1, 3])), groups=draw(st.sampled_from([1, 2]))
            )
            model.bn = nn.BatchNorm2d(channels, eps=1e-3)
        if draw(st.booleans()):
            model.norm = nn.LayerNorm((draw(widths), draw(widths)), bias=draw(st.booleans()))
        if draw(st.booleans()):
            model.head = nn.Sequential(nn.Linear(8, draw(widths), bias=False), nn.ReLU())
        for layer in model.layers:
            assert isinstance(layer, Attention)
            heads = draw(st.integers(1, 4))
            layer.num_heads, layer.window = heads, (draw(st.integers(1, 3)), 2)
            layer.groups = draw(st.sampled_from([None, 2]))
            layer.gate = nn.Parameter(torch.empty(heads), requires_grad=True)
            layer.register_buffer("index", torch.empty(heads, 4, dtype=torch.int64))
            if draw(st.booleans()):
                layer.proj = draw(st.sampled_from([nn.Linear(2 * heads, 8), nn.Identity()]))
        del model.layers[draw(st.integers(1, 3)) :]
    return model


@settings(max_examples=60, deadline=None)
@given(edited())
def test_any_edit_survives_the_trip_through_json(model: Net) -> None:
    assert signature(round_trip(model)) == signature(model)


def test_an_unedited_model_has_no_difference() -> None:
    found = structure.difference(Net(), skeleton())
    assert not found.changes()
    assert found.to_dict() == {"modules": {}, "attributes": {}}


def test_apply_keeps_device_and_training_mode() -> None:
    model = Net().eval()
    model.head[0] = nn.Linear(8, 3)
    fresh = Net().eval()
    structure.apply(fresh, structure.difference(model, skeleton()))
    assert fresh.head[0].weight.device.type == "cpu"
    assert fresh.head[0].weight.shape == (3, 8)
    assert not fresh.head[0].training


def test_a_layer_that_is_used_twice_stays_one() -> None:
    def shared_net() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)})

    model = shared_net()
    model["a"] = model["b"] = nn.Linear(4, 2)
    fresh = shared_net()
    structure.apply(fresh, structure.difference(model, shared_net()))
    assert fresh["a"] is fresh["b"]
    assert fresh["a"].out_features == 2
    assert fresh["c"].out_features == 4


def test_a_module_set_to_none_is_removed() -> None:
    model = Net()
    model.norm = None  # type: ignore[assignment]
    fresh = skeleton()
    structure.apply(fresh, structure.difference(model, skeleton()))
    assert fresh.norm is None


def test_a_layer_may_be_added_where_there_was_none() -> None:
    model = Net()
    model.head.append(nn.Linear(2, 2))
    fresh = skeleton()
    structure.apply(fresh, structure.difference(model, skeleton()))
    assert signature(fresh) == signature(model)


def test_what_cannot_be_described_is_refused() -> None:
    model = Net()
    model.head[1] = nn.GELU()  # type: ignore[assignment]
    with pytest.raises(
        ArtifactError, match=r"module 'head.1' is a GELU, where the model's configuration has ReLU; only"
    ):
        structure.difference(model, skeleton())
    model = Net()
    model.extra = nn.Bilinear(2, 2, 2)
    with pytest.raises(ArtifactError, match="'extra' is a Bilinear, where the model's configuration has nothing"):
        structure.difference(model, skeleton())
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head[0])
    with pytest.raises(ArtifactError, match=r"'head\.0' is a ParametrizedLinear"):
        structure.difference(model, skeleton())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modulse": {}}, "has an unknown key 'modulse': did you mean 'modules'"),
        ({"modules": {"head.0": {"type": "Linaer"}}}, "layer of unknown type 'Linaer': did you mean 'Linear'"),
        ({"modules": {"head.0": {"type": "Linear", "in": 3}}}, "describes a layer of type 'Linear' wrongly"),
        ({"modules": {"tail.0": {"type": "Identity"}}}, "has a module 'tail', which Net has not"),
        ({"attributes": {"layers.0": {"num_hands": 2}}}, "attribute 'num_hands' does not exist on module 'layers.0'"),
        ({"attributes": {"layers.0": {"_modules": 2}}}, "attribute '_modules' does not exist"),
        ({"shapes": {"layers.0.gates": [2]}}, "has a tensor 'gates', which its module Attention has not"),
    ],
)
def test_a_damaged_description_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        structure.apply(skeleton(), Structure.from_dict(content))


def test_from_dict_copies() -> None:
    content: dict[str, Any] = {"modules": {"head.0": {"type": "Identity"}}}
    before = copy.deepcopy(content)
    Structure.from_dict(content).modules["head.0"]["type"] = "Linear"
    assert content == before


def test_build_makes_the_layer_where_asked() -> None:
    spec = {"type": "Conv2d", "in_channels": 4, "out_channels": 2, "kernel_size": [3, 1], "padding": "same"}
    layer = build(spec, device="meta")
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.shape == (2, 4, 3, 1)
    assert layer.weight.device.type == "meta"
    again = describe(layer)
    assert again is not None and build(again, device="cpu").weight.device.type == "cpu"  # type: ignore[union-attr]


def test_a_subclass_is_described_by_its_skeleton() -> None:
    class Mine(nn.Linear):
        pass

    assert describe(Mine(2, 2)) is None
    model, fresh = nn.Sequential(Mine(2, 3)), nn.Sequential(Mine(2, 2))
    found = structure.difference(model, fresh)
    structure.apply(fresh, found)
    assert found.attributes == {"0": {"out_features": 3}}
    assert fresh[0](torch.zeros(1, 2)).shape == (1, 3)


def test_shared_tensors_are_stored_once() -> None:
    weight = torch.arange(6.0)
    state = {"a": weight, "b": weight, "c": weight[:3], "d": weight.clone(), "e": torch.empty(0), "f": torch.empty(0)}
    assert structure.shared(state) == {"b": "a"}
    assert structure.shared(state, {"a"}) == {"a": "b"}
    assert structure.shared(state, {"a", "b"}) == {"b": "a"}
