"""Linear4bit: the same function as its dense layer, one copy in memory, canonical tensors in files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pykd.nn import COMPRESSED, Linear4bit
from pykd.nn import linear_4bit as module
from pykd.nn.codecs.four_bit import dequantize_4bit, quantize_4bit
from pykd.ops.linear_4bit_reference import quantize_groups

CASES: list[dict[str, Any]] = [
    {},
    {"scheme": "nf4", "group_size": 64},
    {"scheme": "fp4", "group_size": None},
    {"symmetric": False, "group_size": 20},
    {"scheme": "w4a8"},
    {"scheme": "w4a8", "symmetric": False, "group_size": 20},
]


def layer(case: dict[str, Any], *, zeros: float = 0.0, bias: bool = True) -> tuple[nn.Linear, Linear4bit]:
    linear = nn.Linear(67, 45, bias=bias)
    with torch.no_grad():
        linear.weight[torch.rand(45, 67) < zeros] = 0
    return linear, Linear4bit.from_linear(linear, **case)


@pytest.mark.parametrize("zeros", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_what_its_dense_layer_computes(case: dict[str, Any], zeros: float) -> None:
    linear, compressed = layer(case, zeros=zeros)
    dense = compressed.to_dense()
    x = torch.randn(3, 5, 67)
    tolerance = 0.03 if case.get("scheme") == "w4a8" else 1e-5
    torch.testing.assert_close(compressed(x), dense(x), rtol=tolerance, atol=tolerance)
    assert dense.bias is linear.bias
    assert torch.equal(compressed.weight, compressed.dequantize()) and compressed.weight.shape == linear.weight.shape
    assert (compressed.weight[linear.weight == 0] == 0).all()
    assert (compressed(x) - linear(x)).abs().max() < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_w4a8_is_w4a16_with_rounded_activations(symmetric: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(67, 45)
    rounds = Linear4bit.from_linear(linear, scheme="w4a8", symmetric=symmetric)
    keeps = Linear4bit.from_linear(linear, symmetric=symmetric)
    assert {**rounds.spec(), "scheme": "w4a16"} == keeps.spec()
    for name, tensor in keeps.state_dict().items():
        assert torch.equal(rounds.state_dict()[name], tensor)
    x = torch.randn(5, 67)
    codes, scales = quantize_groups(x, 32)
    rounded = codes * scales.repeat_interleave(32, dim=1)[:, :67]
    torch.testing.assert_close(rounds(x), keeps(rounded), rtol=1e-5, atol=1e-5)
    assert (rounds(x) - keeps(x)).abs().max() > 1e-4


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_spec_and_state_dict_rebuild_it(case: dict[str, Any], zeros: float, device: str, tmp_path: Path) -> None:
    _, compressed = layer(case, zeros=zeros)
    spec = compressed.spec()
    state = compressed.state_dict()
    codes = {"bitmask", "qvalues"} if zeros else {"qweight"}
    assert set(state) == codes | {"scales", "bias"} | (set() if case.get("symmetric", True) else {"zeros"})
    save_file(state, tmp_path / "layer.safetensors")
    again = COMPRESSED[spec["type"]].from_spec(spec, device=device)
    assert {name: (t.shape, t.dtype) for name, t in again.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = torch.randn(4, 67)
    assert torch.equal(again(x), compressed(x))
    assert again.spec() == spec
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_tensors_set_from_outside_are_packed_by_finalize() -> None:
    _, compressed = layer({})
    again = Linear4bit.from_spec(compressed.spec(), device="meta")
    again.finalize()
    assert not again.finalized
    for name, tensor in compressed.state_dict().items():
        setattr(again, name, nn.Parameter(tensor) if name == "bias" else tensor)
    x = torch.randn(2, 67)
    torch.testing.assert_close(again(x), compressed(x), rtol=1e-5, atol=1e-5)  # works unpacked too
    again.finalize()
    again.finalize()
    assert torch.equal(again(x), compressed(x))


def test_one_copy_in_memory_and_less_on_disk() -> None:
    compressed = Linear4bit.from_linear(nn.Linear(512, 256, bias=False))
    stored = sum(t.nbytes for t in compressed.state_dict().values())
    resident = sum(t.nbytes for t in compressed.buffers())
    assert resident <= 1.05 * stored
    assert stored <= 512 * 256 * (0.5 + 2 / 32)
    sparse = nn.Linear(512, 256, bias=False)
    with torch.no_grad():
        sparse.weight[torch.rand(256, 512) < 0.8] = 0
    both = sum(t.nbytes for t in Linear4bit.from_linear(sparse).state_dict().values())
    assert both <= 512 * 256 * (1 / 8 + 0.21 / 2 + 2 / 32)


def test_copies_pickles_and_keeps_its_element_types() -> None:
    linear, compressed = layer({"scheme": "nf4"}, zeros=0.7)
    x = torch.randn(2, 67)
    again = pickle.loads(pickle.dumps(copy.deepcopy(compressed)))
    assert torch.equal(again(x), compressed(x))
    again.to(torch.bfloat16)
    assert again.weight.dtype == torch.bfloat16 and again.bias.dtype == torch.bfloat16
    assert again.state_dict()["scales"].dtype == torch.float16
    assert again(x.bfloat16()).dtype == torch.bfloat16
    assert again.float().dequantize().equal(compressed.dequantize())
    assert linear.bias.dtype == torch.float32


def test_moves_between_devices_through_the_canonical_tensors() -> None:
    _, compressed = layer({}, zeros=0.7)
    moved = copy.deepcopy(compressed).to("meta")
    assert set(dict(moved.named_buffers())) == {"bitmask", "qvalues", "scales"}
    assert all(tensor.is_meta for tensor in moved.buffers())


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", None)
    for zeros in (0.0, 0.7):
        _, compressed = layer({"symmetric": False}, zeros=zeros)
        x = torch.randn(2, 67)
        torch.testing.assert_close(compressed(x), compressed.to_dense()(x), rtol=1e-5, atol=1e-5)
        again = Linear4bit.from_spec(compressed.spec())
        again.load_state_dict(compressed.state_dict())
        assert torch.equal(again(x), compressed(x))


def test_trains_input_and_bias_only() -> None:
    _, compressed = layer({})
    assert [name for name, _ in compressed.named_parameters()] == ["bias"]
    x = torch.randn(3, 67, requires_grad=True)
    compressed(x).square().sum().backward()
    dense = compressed.to_dense()
    copied = x.detach().clone().requires_grad_()
    compressed_bias = compressed.bias.grad.clone()
    compressed.bias.grad = None
    dense(copied).square().sum().backward()
    torch.testing.assert_close(x.grad, copied.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compressed_bias, dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_compiles_and_exports() -> None:
    model = nn.Sequential(layer({})[1], nn.ReLU())
    x = torch.randn(3, 67)
    for dynamic in (None, True):  # None turns sizes into symbols when another call has had others
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for rows in (3, 5):
            torch.testing.assert_close(compiled(x[:1].expand(rows, -1)), model(x[:1].expand(rows, -1)))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_repr_says_what_it_is() -> None:
    text = repr(layer({"symmetric": False}, zeros=0.7)[1])
    assert "in_features=67, out_features=45, bias=True, scheme=w4a16, group_size=32, asymmetric, kept=0." in text


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"scheme": "w4a61"}, "unknown 4-bit scheme 'w4a61': did you mean 'w4a16'"),
        ({"scheme": "nf4", "symmetric": False}, "symmetric=False goes with schemes 'w4a16' and 'w4a8' only, got 'nf4'"),
    ],
)
def test_errors(case: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_chosen_elsewhere_are_taken_as_they_are(case: dict[str, Any]) -> None:
    linear, rounded = layer(case, zeros=0.3)
    tensors = quantize_4bit(linear.weight * 0.9, code=rounded.code, group_size=rounded.group_size)
    taken = Linear4bit.from_codes(linear, tensors, **case)
    assert taken.bias is linear.bias and taken.spec()["type"] == "Linear4bit"
    sizes: dict[str, Any] = {"code": rounded.code, "in_features": 67, "group_size": rounded.group_size}
    assert torch.equal(taken.weight, dequantize_4bit(tensors, **sizes))


def test_codes_that_do_not_fit_are_refused() -> None:
    linear = nn.Linear(67, 45)
    tensors = quantize_4bit(linear.weight, code="uint4", group_size=32)
    with pytest.raises(ValueError, match=r"zeros must be None for 45 x 67 weights in int4 .* 32, got \(45, 2\)"):
        Linear4bit.from_codes(linear, tensors)
    with pytest.raises(ValueError, match=r"zeros must be \(45, 2\) for .* in uint4 with group size 32, got None"):
        Linear4bit.from_codes(linear, tensors._replace(zeros=None), symmetric=False)
    with pytest.raises(ValueError, match=r"scales must be \(45, 1\) for .* group size 128, got \(45, 3\)"):
        Linear4bit.from_codes(linear, tensors, symmetric=False, group_size=128)
    with pytest.raises(ValueError, match=r"qweight must be \(45, 32\) for 45 x 64 weights"):
        Linear4bit.from_codes(nn.Linear(64, 45), tensors)


def test_a_damaged_bitmask_is_an_error() -> None:
    _, compressed = layer({}, zeros=0.7)
    state: dict[str, Tensor] = dict(compressed.state_dict())
    state["bitmask"] = state["bitmask"] ^ 1
    with pytest.raises(ValueError, match=r"bitmask keeps \d+ weights but qvalues holds \d+: the tensors are damaged"):
        Linear4bit.from_spec(compressed.spec()).load_state_dict(state)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_an_activation_in_the_same_call(activation: str) -> None:
    linear, plain = layer({})
    fused = Linear4bit.from_linear(linear, activation=activation)
    codes = quantize_4bit(linear.weight)
    taken = Linear4bit.from_codes(linear, codes, activation=activation)
    x = torch.randn(3, 5, 67)
    dense = fused.to_dense()
    torch.testing.assert_close(fused(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense[0](x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(taken(x), fused(x)) and torch.equal(fused.to_linear().weight, plain.weight)
    assert fused.spec() == {**plain.spec(), "activation": activation} and f"activation={activation}" in repr(fused)
    again = COMPRESSED["Linear4bit"].from_spec(json.loads(json.dumps(fused.spec())))
    again.load_state_dict(fused.state_dict())
    assert torch.equal(copy.deepcopy(again)(x), fused(x))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'gelo': did you mean 'gelu'"):
        Linear4bit.from_linear(nn.Linear(8, 8), activation="gelo")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [{}, {"scheme": "w4a8", "symmetric": False}], ids=str)
def test_scales_keep_their_type(case: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    linear, plain = layer(case, zeros=0.7)
    tensors = quantize_4bit(linear.weight, code=plain.code)
    scales = (tensors.scales.float() * 1.001).to(dtype)
    taken = Linear4bit.from_codes(linear, tensors._replace(scales=scales), **case)
    assert taken.spec()["scales_dtype"] == str(dtype).removeprefix("torch.") and "scales_dtype" not in plain.spec()
    state = taken.state_dict()
    assert torch.equal(state["scales"], scales)
    save_file(state, tmp_path / "layer.safetensors")
    again = Linear4bit.from_spec(taken.spec())
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(4, 67)
    assert torch.equal(again(x), taken(x)) and torch.equal(again.state_dict()["scales"], scales)
    tolerance = 0.03 if case else 1e-5
    torch.testing.assert_close(taken(x), taken.to_dense()(x), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="scales must be float16, bfloat16 or float32, got torch"):
        Linear4bit.from_codes(linear, tensors._replace(scales=scales.double()), **case)
