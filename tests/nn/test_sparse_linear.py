from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.nn import COMPRESSED, SparseLinear
from pykd.nn.codecs.sparse_formats import index_shapes


def pruned(out: int = 24, columns: int = 37, density: float = 0.3, **options: object) -> tuple[nn.Linear, SparseLinear]:
    """A dense layer with zeros and the sparse layer made from it."""
    linear = nn.Linear(columns, out, **options)  # type: ignore[arg-type]
    mask = torch.rand(out, columns) < density
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear, SparseLinear.from_linear(linear)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_computes_what_the_dense_layer_computes(dtype: torch.dtype, bias: bool) -> None:
    linear, layer = pruned(bias=bias, dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for rows in (1, 3, 40):
        x = torch.randn(rows, 37, dtype=dtype)
        torch.testing.assert_close(layer(x), linear(x), **tolerance)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.to_linear().weight, linear.weight)
    assert layer.to_dense().bias is layer.bias
    assert layer.sparsity == pytest.approx(float((linear.weight == 0).float().mean()))
    assert torch.equal(layer.mask, linear.weight != 0)


@pytest.mark.parametrize("format", ["csr16", "4x1", "16x16", "2:4", "1:4"])
@torch.no_grad()
def test_every_format_computes_saves_and_moves(mask_of: Callable[..., Tensor], format: str) -> None:
    linear = nn.Linear(64, 40)
    mask = mask_of(format, 40, 64)
    layer = SparseLinear.from_linear(linear, mask=mask, format=format)
    x = torch.randn(3, 64)
    want = F.linear(x, linear.weight * mask, linear.bias)
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.weight, linear.weight * mask) and f"format={format}" in repr(layer)
    index = set(index_shapes(format, 40, 64, int(mask.sum())))
    state = layer.state_dict()
    assert set(state) == {"values", "bias"} | index and layer.spec()["format"] == format
    for device in (None, "meta"):
        other = COMPRESSED["SparseLinear"].from_spec(layer.spec(), device=device)
        other.load_state_dict(state, assign=device == "meta")
        assert torch.equal(other(x), layer(x)) and set(other.state_dict()) == set(state)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to("meta")):
        assert set(other.state_dict()) == set(state)
    assert set(dict(layer.named_buffers())) == {"bitmask"}


def test_files_without_a_format_hold_a_bitmask() -> None:
    _, layer = pruned()
    spec = {name: value for name, value in layer.spec().items() if name != "format"}
    old = SparseLinear.from_spec(spec)
    assert set(old.state_dict()) == {"bitmask", "values", "bias"}
    old.load_state_dict(layer.state_dict())
    assert old.spec() == layer.spec()


def test_a_layer_that_was_damaged_is_not_saved() -> None:
    _, layer = pruned()
    layer.bitmask[0, 0] ^= 1
    with pytest.raises(ValueError, match="corrupt packed weight"):
        layer.state_dict()


def test_training_moves_the_kept_weights_only_and_inference_follows() -> None:
    linear, layer = pruned()
    mask = layer.mask
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(8, 37)
    for _ in range(3):
        with torch.no_grad():
            before = layer(x)  # makes the kernel's layout
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            after = layer(x)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(after, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.mask, mask)
    assert bool((layer.weight[~mask] == 0).all())
    assert not torch.equal(layer.weight[mask], linear.weight[mask])


def test_masks_survive_merging() -> None:
    """Of two models that were trained apart, and of what an adapter adds to the dense weight."""
    linear, layer = pruned()
    mask, other = layer.mask, copy.deepcopy(layer)
    with torch.no_grad():
        other.values.add_(1)
    states = layer.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("bitmask", "bias"))
    mean = {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items() if name != "bitmask"}
    other.load_state_dict({**states[0], **mean})
    assert torch.equal(other.mask, mask) and torch.allclose(other.weight, layer.weight + 0.5 * mask)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(other)
    assert torch.equal(averaged.module.mask, mask)
    with torch.no_grad():
        linear.weight.add_(torch.randn(24, 2) @ torch.randn(2, 37))
        merged = SparseLinear.from_linear(linear, mask=mask)
        assert torch.equal(merged.mask, mask) and torch.equal(merged.weight, linear.weight * mask)


def test_an_explicit_mask_keeps_zeros_trainable() -> None:
    linear = nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    mask = torch.rand(4, 6) < 0.5
    layer = SparseLinear.from_linear(linear, mask=mask)
    assert layer.values.numel() == int(mask.sum()) and torch.equal(layer.mask, mask)
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.shape == layer.values.shape


def test_state_dict_spec_and_copies() -> None:
    _, layer = pruned()
    x = torch.randn(3, 37)
    with torch.no_grad():
        want = layer(x)
        assert set(layer.state_dict()) == {"bitmask", "values", "bias"}
        rebuilt = COMPRESSED[layer.spec()["type"]].from_spec(layer.spec())
        rebuilt.load_state_dict(layer.state_dict())
        file = io.BytesIO()
        pickle.dump(layer, file)
        for other in (rebuilt, copy.deepcopy(layer), pickle.loads(file.getvalue())):
            assert torch.equal(other(x), want)
        empty = SparseLinear.from_spec(layer.spec(), device="meta")
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
        }
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(empty(x), want)
        other = copy.deepcopy(layer)
        other.values.mul_(2)
        assert torch.equal(layer(x), want)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.values.dtype == half.dtype == torch.bfloat16 and half.bitmask.dtype == torch.uint8


@pytest.mark.parametrize("columns", [0, 1, 8])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_degenerate_matrices(columns: int, density: float) -> None:
    mask = torch.full((5, columns), bool(density))
    linear = nn.Linear(columns, 5) if columns else nn.Linear(1, 5)
    if not columns:
        linear.weight, linear.in_features = nn.Parameter(torch.zeros(5, 0)), 0
    layer = SparseLinear.from_linear(linear, mask=mask)
    x = torch.randn(2, columns)
    want = F.linear(x, linear.weight * mask, linear.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x), want)


def test_compiles_and_exports() -> None:
    _, layer = pruned()
    layer.requires_grad_(False)
    x = torch.randn(4, 37)
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), want)
    assert any(node.target == torch.ops.pykd.sparse_linear.default for node in exported.graph.nodes)


def test_a_compiled_layer_follows_training() -> None:
    _, layer = pruned()
    x = torch.randn(4, 37)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    compiled(x).sum().backward()
    with torch.no_grad():
        layer.values.sub_(layer.values.grad)
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))


def test_damage_is_refused() -> None:
    _, layer = pruned()
    damaged = layer.state_dict()
    damaged["bitmask"] = damaged["bitmask"].clone()
    damaged["bitmask"][0, 0] ^= 1
    with pytest.raises(ValueError, match="corrupt packed weight: the bitmask keeps"):
        copy.deepcopy(layer).load_state_dict(damaged)
    with pytest.raises(ValueError, match="mask has to be boolean"):
        SparseLinear.from_linear(nn.Linear(3, 2), mask=torch.ones(2, 3))


def test_tuning_reports_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = pruned()
    times = {1: {"dense": 40.0, "expand": 10.0, "panels": 20.0}, 16: {"dense": 40.0, "panels": 40.0}}
    monkeypatch.setattr("pykd.nn.sparse_linear.measure", lambda packed, *, rows: {r: times[r] for r in rows})
    report = layer.tune((1, 16))
    quantized = report.pop("quantized")
    size = layer.values.nbytes + layer.bitmask.nbytes
    assert report == {
        "gain": 2.0, "routes": {"1": "expand", "16": "dense"}, "note": "2.00x faster than dense",
        "us": {"1": 10.0, "16": 40.0}, "bytes": size,
    }  # fmt: skip
    assert set(quantized) == {"w8a8", "w4a16"}
    for of in quantized.values():
        assert set(of["us"]) == {"1", "16"} and min(of["us"].values()) > 0 and 0 < of["bytes"] < size
    assert type(layer) is SparseLinear and json.dumps(report | quantized)
    assert layer.tune((16,))["note"] == "no gain here: computed dense"
    monkeypatch.setattr("pykd.nn.sparse_linear.measure", lambda packed, *, rows: {})
    assert layer.tune() == {}


def test_rows_measure_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(SparseLinear, "tune", lambda self, rows: asked.append(rows))
    SparseLinear.from_linear(nn.Linear(8, 4), rows=(1, 16))
    assert asked == [(1, 16)]


@pytest.mark.parametrize("format", ["bitmask", "csr16", "2:4"])
def test_a_layer_shows_its_weight_before_it_is_finalized(format: str) -> None:
    """Loaders of transformers look at some layers' weights between filling and finalizing them."""
    mask = torch.tensor([True, False, True, False] * 2).repeat(5, 1)
    layer = SparseLinear.from_linear(nn.Linear(8, 5), mask=mask, format=format)
    skeleton = SparseLinear.from_spec(layer.spec())
    empty = skeleton.state_dict()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            empty[name].copy_(tensor)
    assert not skeleton.finalized and torch.equal(skeleton.weight, layer.weight) and torch.equal(skeleton.mask, mask)
