"""Linear8bit: close to its dense layer, canonical tensors in files, dense or sparse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pykd.nn import COMPRESSED, Linear8bit
from pykd.ops.dispatch import native
from pykd.ops.int8_r16 import pack_r16
from pykd.ops.linear_8bit import SCHEMES_8BIT, linear_8bit


def layer(zeros: float = 0.0, *, bias: bool = True, scheme: str = "w8a8") -> tuple[nn.Linear, Linear8bit]:
    linear = nn.Linear(67, 45, bias=bias)
    with torch.no_grad():
        linear.weight[torch.rand(45, 67) < zeros] = 0
    return linear, Linear8bit.from_linear(linear, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_is_close_to_the_dense_layer(zeros: float, bias: bool, scheme: str) -> None:
    linear, compressed = layer(zeros, bias=bias, scheme=scheme)
    x = torch.randn(3, 5, 67)
    assert (compressed(x) - linear(x)).abs().max() < (0.03 if scheme == "w8a8" else 0.02)
    if scheme == "w8a16":
        torch.testing.assert_close(compressed(x), compressed.to_dense()(x))
    assert (compressed.to_dense()(x) - linear(x)).abs().max() < 0.02
    assert (compressed.weight[linear.weight == 0] == 0).all()
    assert compressed.to_linear().weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_spec_and_state_dict_rebuild_it(zeros: float, device: str, scheme: str) -> None:
    _, compressed = layer(zeros, scheme=scheme)
    state = compressed.state_dict()
    assert set(state) == {"scales", "bias"} | ({"bitmask", "qvalues"} if zeros else {"qweight"})
    if zeros:
        assert sum(t.nbytes for t in state.values()) < 45 * 67 * 0.65
    again = COMPRESSED["Linear8bit"].from_spec(compressed.spec(), device=device)
    again.load_state_dict(state, assign=True)
    x = torch.randn(4, 67)
    assert torch.equal(again(x), compressed(x)) and again.spec() == compressed.spec()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_copies_pickles_and_keeps_its_element_types(scheme: str) -> None:
    _, compressed = layer(0.6, scheme=scheme)
    x = torch.randn(2, 67)
    again = pickle.loads(pickle.dumps(copy.deepcopy(compressed)))
    assert torch.equal(again(x), compressed(x))
    again.to(torch.bfloat16)
    assert again(x.bfloat16()).dtype == again.weight.dtype == torch.bfloat16
    assert again.state_dict()["scales"].dtype == torch.float32
    moved = again.to("meta")
    assert set(dict(moved.named_buffers())) == {"bitmask", "qvalues", "scales"}


def test_a_file_of_before_int8_r16_loads() -> None:
    """What was released: int8 codes and float32 scales under these names, and a spec with these keys."""
    codes, scales = torch.randint(-127, 128, (45, 67), dtype=torch.int8), torch.rand(45)
    sizes = {"in_features": 67, "out_features": 45, "bias": False}
    spec = {"type": "Linear8bit", **sizes, "scheme": "w8a8", "nnz": None, "dtype": "float32"}
    again = Linear8bit.from_spec(spec)
    again.load_state_dict({"qweight": codes, "scales": scales})
    assert again.spec() == spec
    assert torch.equal(again.dequantize(), codes * scales.unsqueeze(1))
    x = torch.randn(4, 67)
    assert torch.allclose(again(x), linear_8bit(x, codes, scales), rtol=1e-6)


@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_one_copy_of_the_weight_is_resident(zeros: float) -> None:
    linear = nn.Linear(768, 96)
    with torch.no_grad():
        linear.weight[torch.rand(96, 768) < zeros] = 0
    compressed = Linear8bit.from_linear(linear)
    resident = sum(buffer.untyped_storage().nbytes() for buffer in compressed.buffers())
    assert resident <= 1.05 * (96 * 768 + 4 * 96)


@pytest.mark.skipif(native is None, reason="panels of codes are the native kernel's")
@pytest.mark.parametrize(("zeros", "resident"), [(0.8, {"packed", "panels", "scales"}), (0.99, {"panels", "scales"})])
def test_a_pruned_layer_computes_from_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, zeros: float, resident: set[str]
) -> None:
    monkeypatch.setattr("pykd.nn.linear_8bit.least_rows", lambda density: 1 if density < 0.05 else 17)
    _, compressed = layer(zeros)
    assert set(dict(compressed.named_buffers())) == resident
    state = compressed.state_dict()
    assert set(state) == {"bitmask", "qvalues", "scales", "bias"}
    codes = compressed._tensors()
    for rows in (1, 20, 130):
        x = torch.randn(rows, 67)
        want = linear_8bit(x, pack_r16(*codes), bias=compressed.bias, out_features=45)
        assert torch.equal(compressed(x), want)
        rebuilt = Linear8bit.from_spec(compressed.spec())
        rebuilt.load_state_dict(state)
        for other in (rebuilt, copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
            assert torch.equal(other(x), want) and set(dict(other.named_buffers())) == resident
    x = torch.randn(20, 67).double()
    torch.testing.assert_close(compressed(x).float(), compressed(x.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zeros", [0.0, 0.7])
@pytest.mark.parametrize("group_size", [16, 30, 100])
def test_a_scale_per_group(group_size: int, zeros: float) -> None:
    linear, per_row = layer(zeros, scheme="w8a16")
    grouped = Linear8bit.from_linear(linear, scheme="w8a16", group_size=group_size)
    x = torch.randn(3, 5, 67, requires_grad=True)
    state = grouped.state_dict()
    assert state["scales"].shape == (45, -(-67 // group_size)) and ("bitmask" in state) == bool(zeros)
    errors = [(module.weight - linear.weight).norm() for module in (grouped, per_row)]
    assert errors[0] < errors[1] if group_size < 67 else torch.equal(grouped.weight, per_row.weight)
    assert bool((grouped.weight[linear.weight == 0] == 0).all())
    torch.testing.assert_close(grouped(x), grouped.to_dense()(x))
    grouped(x).sum().backward()
    torch.testing.assert_close(x.grad, grouped.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    assert grouped(x.bfloat16()).dtype == torch.bfloat16
    for device in ("cpu", "meta"):
        again = Linear8bit.from_spec(grouped.spec(), device=device)
        again.load_state_dict(state, assign=True)
        assert torch.equal(again(x), grouped(x)) and again.spec() == grouped.spec()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(grouped)))
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach()), grouped(x))
    assert f"scheme=w8a16, group_size={group_size}" in repr(grouped)


def test_where_a_scale_per_group_does_not_go() -> None:
    with pytest.raises(ValueError, match="a scale per group goes with scheme 'w8a16' only, got 'w8a8' with 32"):
        Linear8bit.from_linear(nn.Linear(4, 4), group_size=32)
    with pytest.raises(ValueError, match="group_size must be at least 1, or None for the whole row, got 0"):
        Linear8bit.from_linear(nn.Linear(4, 4), scheme="w8a16", group_size=0)


def test_threads_may_change_after_packing() -> None:
    _, compressed = layer()
    x = torch.randn(9, 67)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            results.append(compressed(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_longer_than_32_bit_sums_allow_stays_canonical() -> None:
    compressed = Linear8bit.from_linear(nn.Linear(131_073, 2))
    assert set(dict(compressed.named_buffers())) == {"qweight", "scales"}
    assert compressed(torch.randn(1, 131_073)).isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_compiles_as_one_graph(scheme: str) -> None:
    _, compressed = layer(scheme=scheme)
    model = nn.Sequential(nn.Linear(67, 67), nn.GELU(), compressed)
    x = torch.randn(5, 67)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="unknown 8-bit scheme 'w8a9': did you mean 'w8a8'"):
        Linear8bit(3, 4, "w8a9")


def test_gradient_and_repr() -> None:
    _, compressed = layer()
    x = torch.randn(3, 67, requires_grad=True)
    compressed(x).sum().backward()
    torch.testing.assert_close(x.grad, compressed.weight.sum(0).expand(3, 67), rtol=1e-4, atol=1e-4)
    assert torch.equal(compressed.bias.grad, torch.full((45,), 3.0))
    assert "in_features=67, out_features=45, bias=True, scheme=w8a8" in repr(compressed)
    assert "kept=0.4" in repr(layer(0.6)[1]) or "kept=0.3" in repr(layer(0.6)[1])


def test_a_damaged_bitmask_is_an_error() -> None:
    _, compressed = layer(0.6)
    state = dict(compressed.state_dict())
    state["bitmask"] = state["bitmask"] ^ 1
    with pytest.raises(ValueError, match=r"bitmask keeps \d+ weights but qvalues holds \d+: the tensors are damaged"):
        Linear8bit.from_spec(compressed.spec()).load_state_dict(state)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_an_activation_in_the_same_call(scheme: str) -> None:
    linear, plain = layer(scheme=scheme)
    fused = Linear8bit.from_linear(linear, scheme=scheme, activation="gelu")
    x = torch.randn(3, 5, 67)
    torch.testing.assert_close(fused(x), nn.functional.gelu(plain(x)), rtol=1e-5, atol=1e-6)
    assert isinstance(fused.to_dense()[1], nn.GELU) and torch.equal(fused.to_linear().weight, plain.weight)
    assert fused.spec() == {**plain.spec(), "activation": "gelu"} and "activation=gelu" in repr(fused)
    again = COMPRESSED["Linear8bit"].from_spec(fused.spec())
    again.load_state_dict(fused.state_dict())
    assert torch.equal(again(x), fused(x))
    if scheme == "w8a16":
        grouped = Linear8bit.from_linear(linear, scheme=scheme, group_size=16, activation="gelu")
        torch.testing.assert_close(grouped(x), grouped.to_dense()(x), rtol=1e-5, atol=1e-6)
        assert Linear8bit.from_spec(grouped.spec()).spec() == grouped.spec()


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        Linear8bit.from_linear(nn.Linear(8, 8), activation="tanh")
