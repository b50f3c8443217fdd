"""linear_4bit with activations rounded to int8 (w4a8): exact sums at every level, and its life as a torch operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.ops import linear_4bit_gpu
from pykd.ops.int4_r16 import dequantize, groups_of, pack_nibbles, pack_r16
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_4bit_reference import linear_4bit_reference, quantize_groups

CODES = ("int4", "uint4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(40, 67, 32), (1, 1, 32), (33, 100, 20), (70, 200, 128), (64, 300, 1000), (129, 255, 64), (5, 9, 1)]


class Weight:
    """A 4-bit weight in both layouts, and as the float64 matrix that it stands for."""

    def __init__(self, tensors: FourBit, features: int, group: int, code: str) -> None:
        self.tensors, self.group = tensors, group
        self.packed = pack_r16(*tensors, in_features=features, group_size=group)
        self.dense = dequantize(*tensors, code=code, in_features=features, group_size=group).double()
        out = len(tensors.scales)
        self.options: dict[str, Any] = {"code": code, "out_features": out, "group_size": group, "inputs": "int8"}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_4bit(x, self.packed, bias=bias, **self.options)

    def check(self, x: Tensor, bias: Tensor | None = None) -> None:
        """Products of codes, exact in float64; the kernel may round once a fold, when it adds it, and at the end."""
        got, flat = self(x, bias), x.reshape(-1, x.shape[-1])
        codes, scales = quantize_groups(flat, self.group)
        rounded = codes.double() * scales.double().repeat_interleave(min(self.group, x.shape[-1]), 1)[:, : x.shape[-1]]
        wide = None if bias is None else bias.double()
        want = F.linear(rounded, self.dense, wide)
        size = F.linear(rounded.abs(), self.dense.abs(), None if wide is None else wide.abs())
        smallest = 6e-8 if x.dtype == torch.float16 else 1e-30
        allowed = 4e-7 * size + torch.finfo(x.dtype).eps * want.abs() + smallest
        wrong = ((got.reshape(want.shape).double() - want).abs() > allowed).nonzero()
        assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], len(self.dense))
        assert len(wrong) == 0, [(i, got.reshape(want.shape)[tuple(i)], want[tuple(i)]) for i in wrong[:3].tolist()]


def make(out: int, features: int, group: int, code: str) -> Weight:
    return Weight(quantize_4bit(torch.randn(out, features), code=code, group_size=group), features, group, code)


def whole(codes: Tensor, zeros: Tensor | None, group: int) -> Weight:
    """Codes as given under scales of 1, so that results are whole numbers."""
    groups = groups_of(codes.shape[1], group).number
    scales = torch.ones(len(codes), groups, dtype=torch.float16)
    tensors = FourBit(pack_nibbles(codes), scales, None if zeros is None else pack_nibbles(zeros))
    return Weight(tensors, codes.shape[1], group, "int4" if zeros is None else "uint4")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_products(isa: str, shape: tuple[int, int, int], code: str) -> None:
    weight = make(*shape, code)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 50):
        dtype = DTYPES[rows % 3]
        bias = None if rows == 2 else torch.randn(shape[0]).to(dtype if rows < 5 else torch.float32)
        weight.check(torch.randn(rows, shape[1]).to(dtype), bias)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    rows, out, features = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 80)), data.draw(st.integers(1, 200))
    group, code = data.draw(st.integers(1, 220)), data.draw(st.sampled_from(CODES))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(rows, features) * 10.0 ** data.draw(st.integers(-3, 3))
    make(out, features, group, code).check(x.to(data.draw(st.sampled_from(DTYPES))))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("features", "group"), [(64, 32), (200, 64), (333, 100), (4096, 4096), (4100, 128)])
def test_sums_are_exact(isa: str, features: int, group: int, code: str) -> None:
    """Whole numbers with an absmax of 127 in every group are their own codes."""
    codes = torch.randint(0, 16, (37, features), dtype=torch.uint8)
    groups = groups_of(features, group)
    zeros = torch.randint(0, 16, (37, groups.number), dtype=torch.uint8) if code == "uint4" else None
    x = torch.randint(-127, 128, (11, features)).float()
    x[:, :: groups.size] = 127
    points = 8 if zeros is None else zeros.long().repeat_interleave(groups.size, 1)[:, :features]
    assert torch.equal(whole(codes, zeros, group)(x).long(), x.long() @ (codes.long() - points).t())


@pytest.mark.parametrize(("code", "zero"), [(0, None), (15, None), (0, 15), (15, 0)])
@pytest.mark.parametrize("activation", [-127.0, 127.0])
def test_the_largest_sums_do_not_overflow(isa: str, activation: float, code: int, zero: int | None) -> None:
    for features, group in ((64, 64), (130, 130), (96, 32), (9000, 9000)):
        codes = torch.full((33, features), code, dtype=torch.uint8)
        groups = groups_of(features, group).number
        zeros = None if zero is None else torch.full((33, groups), zero, dtype=torch.uint8)
        want = (code - (8 if zero is None else zero)) * activation * features
        y = whole(codes, zeros, group)(torch.full((7, features), activation))
        assert torch.equal(y, torch.full((7, 33), want))


def test_activations_are_rounded_as_the_reference_does(isa: str) -> None:
    """An identity weight returns the codes, times their scale; among them ties, and magnitudes of every size."""
    features, group = 130, 48
    identity = whole(8 + torch.eye(features, dtype=torch.uint8), None, group)
    ties = ((torch.arange(features) - 65).float() + 0.5).clamp(-127, 127)
    for row in (ties, *(torch.randn(features) * size for size in (1, 1e-6, 1e4, 1e-38, 3e-45))):
        codes, scales = quantize_groups(row.unsqueeze(0), group)
        want = codes * scales.repeat_interleave(group, 1)[:, :features]
        assert torch.equal(identity(row.unsqueeze(0)), want)


def test_bad_rows_stay_bad_and_rows_are_scaled_alone(isa: str) -> None:
    weight, bias = make(37, 70, 32, "uint4"), torch.randn(37)
    x = torch.stack([torch.randn(70), torch.randn(70) * 1e6, torch.zeros(70), *torch.randn(3, 70)])
    x[3, 2], x[4, 69], x[5, 40] = torch.nan, torch.inf, -torch.inf
    y = weight(x, bias)
    assert torch.equal(y[0], weight(x[0], bias))
    weight.check(x[:3], bias)
    assert torch.equal(y[2], bias) and y[3:].isnan().all()
    assert linear_4bit_reference(x, *weight.tensors, bias, "uint4", 32, "int8")[3:].isnan().all()


def test_shapes_and_strides_of_x(isa: str) -> None:
    weight, base = make(20, 48, 32, "int4"), torch.randn(4, 6, 48)
    views = [base, base[0, 0], base[:, ::2], base.transpose(0, 1), torch.randn(48, 5).t(), torch.randn(9, 99)[:, 7:55]]
    for x in views:
        weight.check(x)
    for empty in (torch.randn(0, 48), torch.randn(3, 0, 48)):
        assert weight(empty).shape == (*empty.shape[:-1], 20)


@pytest.mark.parametrize("code", CODES)
def test_more_rows_than_are_packed_at_a_time(isa: str, code: str) -> None:
    make(65, 40, 32, code).check(torch.randn(800, 40))


@pytest.mark.parametrize("rows", [1, 13, 120])
def test_threads_change_nothing(isa: str, rows: int) -> None:
    weight, x = make(300, 256, 32, "int4"), torch.randn(rows, 256)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weight(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("code", CODES)
def test_canonical_layout_and_float64_run_the_reference(code: str) -> None:
    weight, x, bias = make(33, 50, 16, code), torch.randn(2, 3, 50), torch.randn(33)
    qweight, scales, zeros = weight.tensors
    y = linear_4bit(x, qweight, scales, zeros=zeros, bias=bias, code=code, group_size=16, inputs="int8")
    assert torch.equal(y, linear_4bit_reference(x, *weight.tensors, bias, code, 16, "int8"))
    torch.testing.assert_close(y, weight(x, bias), rtol=1e-5, atol=1e-5)
    assert weight(x.double()).dtype == torch.float64
    torch.testing.assert_close(weight(x.double()).float(), weight(x), rtol=1e-5, atol=1e-5)


def test_rounding_costs_less_than_a_hundredth() -> None:
    weight, x = make(64, 512, 32, "int4"), torch.randn(40, 512)
    want = F.linear(x.double(), weight.dense)
    assert (weight(x) - want).norm() / want.norm() < 0.01


def test_gradient_is_that_of_the_dequantized_layer() -> None:
    weight = make(12, 40, 16, "uint4")
    x, bias = torch.randn(3, 2, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    y = weight(x, bias)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    want = torch.autograd.grad(F.linear(x, weight.dense.float(), bias), (x, bias), grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
def test_opcheck(code: str) -> None:
    weight, x, bias = make(12, 40, 16, code), torch.randn(3, 40, requires_grad=True), torch.randn(12)
    for tensors in ((weight.packed, None, None), weight.tensors):
        torch.library.opcheck(torch.ops.pykd.linear_4bit.default, (x, *tensors, bias, code, 12, 16, "int8"))


def test_compiles_as_one_graph_and_exports() -> None:
    weight, x = make(12, 40, 32, "int4"), torch.randn(3, 40, requires_grad=True)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(weight(x))

    want, compiled = Layer()(x), torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(want.sum(), x))
    torch.testing.assert_close(torch.export.export(Layer(), (x.detach(),)).module()(x.detach()), want)


@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
def test_the_way_of_a_gpu(scales: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded inputs, the Triton kernel (interpreted without a GPU) and the activation after it."""
    monkeypatch.setattr(linear_4bit_gpu, "cuda_library", lambda: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, x = make(33, 100, 20, "uint4"), torch.randn(2, 11, 100)
    qweight, zeros = weight.tensors.qweight, weight.tensors.zeros
    tensors = (qweight, weight.tensors.scales.to(scales), zeros)
    for activation in (None, "silu"):
        call = (x, *tensors, torch.randn(33))
        y = linear_4bit_gpu.cuda(*(t.to(device) for t in call), "uint4", 33, 20, "int8", activation).cpu()
        want = linear_4bit_reference(*call, "uint4", 20, "int8", activation)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES)
def test_on_a_gpu(code: str) -> None:
    weight = make(33, 100, 32, code)
    qweight, scales, zeros = (None if t is None else t.cuda() for t in weight.tensors)
    for rows in (0, 1, 9, 100):
        for dtype in DTYPES:
            x = torch.randn(rows, 100).to(dtype)
            y = linear_4bit(x.cuda(), qweight, scales, zeros=zeros, code=code, group_size=32, inputs="int8").cpu()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(y, weight(x), rtol=2 * eps, atol=1e-4 + eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": "int9"}, "unknown way to take inputs 'int9': did you mean 'int8'"),
        ({"code": "nf4"}, "inputs='int8' needs weights that are whole numbers, int4 or uint4, got 'nf4'"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    weight = make(12, 40, 16, "int4")
    with pytest.raises(ValueError, match=message):
        linear_4bit(torch.zeros(2, 40), weight.packed, **{**weight.options, **change})
