"""linear_8bit: integer sums to the last bit at every instruction-set level, and its life as a torch operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.nn.codecs.eight_bit import EightBit, quantize_8bit
from pykd.ops.int8_r16 import pack_r16
from pykd.ops.linear_8bit import SCHEMES_8BIT, _int_mm, linear_8bit, linear_8bit_reference, quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 67, 33), (17, 513, 129), (5, 64, 32), (8, 100, 70), (50, 31, 65)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(out: int, features: int) -> tuple[EightBit, Tensor]:
    """Canonical tensors and the CPU layout."""
    tensors = quantize_8bit(torch.randn(out, features))
    return tensors, pack_r16(*tensors)


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def sums(x: Tensor, codes: Tensor) -> Tensor:
    """The integer sums of rounded activations and weights."""
    return quantize_rows(x)[0].long() @ codes.long().t()


def assert_rounded(y: Tensor, x: Tensor, tensors: EightBit, bias: Tensor | None) -> None:
    """sum * x_scale * scale + bias from the exact sums; three roundings in float32 and one to the result's type."""
    flat = x.reshape(-1, x.shape[-1])
    exact = sums(flat, tensors.qweight).double() * quantize_rows(flat)[1].double() * tensors.scales.double()
    want = exact if bias is None else exact + bias.double()
    got = y.reshape(want.shape).double()
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * eps * (exact.abs() + want.abs()) + torch.finfo(x.dtype).eps * want.abs() + 1e-30
    if x.dtype == torch.float16:
        allowed += 6e-8  # half of its smallest subnormal, and then some
    wrong = ((got - want).abs() > allowed).nonzero()
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], len(tensors.scales))
    assert len(wrong) == 0, [(tuple(i), got[tuple(i)].item(), want[tuple(i)].item()) for i in wrong[:3].tolist()]


def assert_kept(y: Tensor, x: Tensor, tensors: EightBit, bias: Tensor | None) -> None:
    """No further from float64 than torch at the same dtype, plus rounding of the sum of magnitudes."""
    weight = tensors.qweight.double() * tensors.scales.double().unsqueeze(1)
    want = F.linear(x.double(), weight, wide(bias))
    same = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    size = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    allowed = (same.double() - want).abs() + torch.finfo(x.dtype).eps * want.abs() + 4e-7 * size + 1e-30
    wrong = ((y.double() - want).abs() > allowed).nonzero()
    assert y.dtype == x.dtype
    assert len(wrong) == 0, [(tuple(i), y[tuple(i)].item(), want[tuple(i)].item()) for i in wrong[:3].tolist()]


CHECKS = {"w8a8": assert_rounded, "w8a16": assert_kept}


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_exact_arithmetic(isa: str, shape: tuple[int, int, int], scheme: str) -> None:
    rows, features, out = shape
    tensors, packed = make(out, features)
    for dtype in DTYPES:
        for bias in (None, torch.randn(out), torch.randn(out).to(dtype)):
            x = torch.randn(rows, features).to(dtype)
            y = linear_8bit(x, packed, bias=bias, scheme=scheme, out_features=out)
            CHECKS[scheme](y, x, tensors, bias)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    size = st.integers(1, 80)
    rows, features, out = data.draw(st.integers(0, 30)), data.draw(size), data.draw(size)
    scheme, dtype = data.draw(st.sampled_from(sorted(SCHEMES_8BIT))), data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    tensors, packed = make(out, features)
    x = (torch.randn(rows, features) * 10.0 ** data.draw(st.integers(-3, 3))).to(dtype)
    y = linear_8bit(x, packed, scheme=scheme, out_features=out)
    CHECKS[scheme](y, x, tensors, None)


@pytest.mark.parametrize("features", [2, 131, 9000])
def test_sums_are_exact(isa: str, features: int) -> None:
    """Whole numbers with an absmax of 127 are their own codes, so the result is the sum, rounded once to float32."""
    codes = torch.randint(-128, 128, (40, features), dtype=torch.int8)  # -128 too, which files may hold
    packed, x = pack_r16(codes, torch.ones(40)), torch.randint(-127, 128, (9, features)).float()
    x[:, 0] = 127
    y = linear_8bit(x, packed, out_features=40)
    assert torch.equal(y, (x.long() @ codes.long().t()).float())


@pytest.mark.parametrize(("activation", "code"), [(127, -128), (127, 127), (-127, -128), (-127, 127)])
def test_the_largest_sums_do_not_overflow(isa: str, activation: int, code: int) -> None:
    features = 131072
    packed = pack_r16(torch.full((2, features), code, dtype=torch.int8), torch.ones(2))
    x = torch.full((5, features), float(activation))
    y = linear_8bit(x, packed, out_features=2)
    assert torch.equal(y, torch.full((5, 2), float(activation * code * features)))


def test_activations_are_rounded_as_the_reference_does(isa: str) -> None:
    """An identity weight returns the codes; among them ties between whole numbers, and magnitudes of every size."""
    features = 259
    packed = pack_r16(torch.eye(features, dtype=torch.int8), torch.ones(features))
    ties = (torch.arange(features) - 129).float() + 0.5
    for dtype in DTYPES:
        for row in (ties.clamp(-127, 127), *(torch.randn(features) * size for size in (1, 1e-6, 1e4))):
            x = row.to(dtype).unsqueeze(0)
            codes, scale = quantize_rows(x)
            y = linear_8bit(x.float(), packed, out_features=features)
            assert torch.equal(y, codes.float() * scale)
    for tiny in (1e-38, 3e-45, 1.4e-45 * 200):  # scales that are subnormal, zero, or one unit of the last place
        x = torch.full((1, features), tiny)
        codes, scale = quantize_rows(x)
        assert torch.equal(linear_8bit(x, packed, out_features=features), codes.float() * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("input_zero", [0, -127, 63])
def test_a_given_scale_and_zero_point(isa: str, shape: tuple[int, int, int], input_zero: int) -> None:
    """The exact sums again, of the codes less the zero point; the reference rounds alike."""
    rows, features, out = shape
    tensors, packed = make(out, features)
    static: dict[str, Any] = {"input_scale": float(torch.tensor(0.013)), "input_zero": input_zero}
    for dtype in DTYPES:
        x = torch.randn(rows, features).to(dtype)
        codes, scale = quantize_rows(x, **static)
        assert codes.abs().max() <= 127 and (scale == static["input_scale"]).all()
        exact = (codes.long() - input_zero) @ tensors.qweight.long().t()
        want = exact.double() * static["input_scale"] * tensors.scales.double()
        moved = (input_zero * tensors.qweight.long().sum(1)).abs() * static["input_scale"] * tensors.scales.double()
        for got in (
            linear_8bit(x, packed, out_features=out, **static),
            linear_8bit(x, *tensors, **static),
        ):
            allowed = 4e-7 * (want.abs() + 2 * moved) + torch.finfo(dtype).eps * want.abs() + 1e-7
            assert got.dtype == dtype and ((got.double() - want).abs() <= allowed).all()
    x = torch.randn(3, features)
    x[1, 0] = torch.nan
    assert linear_8bit(x, packed, out_features=out, **static).isnan().any(1).tolist() == [False, True, False]


def test_bad_rows_stay_bad_and_rows_are_scaled_alone(isa: str) -> None:
    tensors, packed = make(37, 21)
    x = torch.stack([torch.randn(21), torch.randn(21) * 1e6, torch.zeros(21), *torch.randn(4, 21)])
    x[3, 2], x[4, 20], x[5, 0], x[6, 7] = torch.nan, torch.nan, torch.inf, -torch.inf
    bias = torch.randn(37)
    y = linear_8bit(x, packed, bias=bias, out_features=37)
    assert torch.equal(y[0], linear_8bit(x[0], packed, bias=bias, out_features=37))
    assert_rounded(y[:3], x[:3], tensors, bias)
    assert torch.equal(y[2], bias) and y[3:].isnan().all()
    y = linear_8bit(x, packed, scheme="w8a16", out_features=37)
    assert torch.equal(y[2], torch.zeros(37)) and y[3:5].isnan().all() and y[:2].isfinite().all()
    want = F.linear(x, tensors.qweight.float() * tensors.scales.unsqueeze(1))
    torch.testing.assert_close(y[5:], want[5:], equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_shapes_and_strides_of_x(isa: str, scheme: str) -> None:
    tensors, packed = make(20, 48)
    base = torch.randn(4, 6, 48)
    views = [base, base[0, 0], base[:, ::2], base.transpose(0, 1), torch.randn(48, 5).t(), torch.randn(9, 99)[:, 7:55]]
    for x in views:
        CHECKS[scheme](linear_8bit(x, packed, scheme=scheme, out_features=20), x, tensors, None)
    for empty in (torch.randn(0, 48), torch.randn(3, 0, 48)):
        assert linear_8bit(empty, packed, scheme=scheme, out_features=20).shape == (*empty.shape[:-1], 20)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_more_rows_than_are_packed_at_a_time(isa: str, scheme: str) -> None:
    tensors, packed = make(65, 40)
    x = torch.randn(800, 40)
    CHECKS[scheme](linear_8bit(x, packed, scheme=scheme, out_features=65), x, tensors, None)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
@pytest.mark.parametrize("rows", [1, 13, 120])
def test_threads_change_nothing(isa: str, threads: int, rows: int, scheme: str) -> None:
    _, packed = make(300, 256)
    x = torch.randn(rows, 256)
    got = linear_8bit(x, packed, scheme=scheme, out_features=300)
    torch.set_num_threads(1)
    assert torch.equal(got, linear_8bit(x, packed, scheme=scheme, out_features=300))


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_canonical_layout_and_float64_run_the_reference(scheme: str) -> None:
    tensors, packed = make(33, 50)
    x, bias = torch.randn(3, 50), torch.randn(33)
    y = linear_8bit(x, *tensors, bias=bias, scheme=scheme)
    assert torch.equal(y, linear_8bit_reference(x, *tensors, bias, scheme))
    CHECKS[scheme](y, x, tensors, bias)
    double = linear_8bit(x.double(), packed, scheme=scheme, out_features=33)
    assert double.dtype == torch.float64
    CHECKS[scheme](double, x.double(), tensors, None)


def test_int_mm_gives_the_same_sums() -> None:
    """The product that a GPU runs, which wants sizes padded; torch has it for the CPU too."""
    for rows, features, out in ((1, 3, 5), (17, 24, 8), (40, 65, 31)):
        a = torch.randint(-127, 128, (rows, features), dtype=torch.int8)
        w = torch.randint(-127, 128, (out, features), dtype=torch.int8)
        assert torch.equal(_int_mm(a, w).long(), a.long() @ w.long().t())


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_on_a_gpu(scheme: str) -> None:
    for rows, features, out in SHAPES:
        tensors, _ = make(out, features)
        x, bias = torch.randn(rows, features), torch.randn(out)
        shipped = EightBit(*(tensor.cuda() for tensor in tensors))
        y = linear_8bit(x.cuda(), *shipped, bias=bias.cuda(), scheme=scheme).cpu()
        CHECKS[scheme](y, x, tensors, bias)


def test_the_rounding_is_within_its_bound(isa: str) -> None:
    weight, x = torch.randn(20, 100), torch.randn(7, 100)
    y = linear_8bit(x, pack_r16(*quantize_8bit(weight)), out_features=20).double()
    step_x, step_w = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1) / 254
    bound = step_x * weight.abs().sum(1) + step_w * x.abs().sum(1, keepdim=True) + 100 * step_x * step_w
    assert ((y - x.double() @ weight.double().t()).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("layout", ["packed", "canonical"])
@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_gradient_is_that_of_the_dequantized_layer(scheme: str, layout: str) -> None:
    tensors, packed = make(6, 24)
    weight = (packed,) if layout == "packed" else tensors
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)):
        x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
        bias = torch.randn(6, dtype=dtype, requires_grad=True)
        grad = torch.randn(2, 3, 6, dtype=dtype)
        y = linear_8bit(x, *weight, bias=bias, scheme=scheme, out_features=6)
        dx, db = torch.autograd.grad(y, (x, bias), grad)
        want = grad @ (tensors.qweight * tensors.scales.unsqueeze(1)).to(dtype)
        torch.testing.assert_close(dx, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(db, grad.sum((0, 1)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_opcheck(scheme: str) -> None:
    tensors, packed = make(6, 24)
    x, bias = torch.randn(2, 3, 24, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.pykd.linear_8bit.default, (x, packed, None, bias, scheme, 6))
    torch.library.opcheck(torch.ops.pykd.linear_8bit.default, (x, *tensors, None, scheme, 6))
    torch.library.opcheck(torch.ops.pykd.dequantize_8bit.default, (packed, None, 6, 24))


@pytest.mark.parametrize("scheme", SCHEMES_8BIT)
def test_compiles_as_one_graph_and_exports(scheme: str) -> None:
    _, packed = make(12, 40)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(linear_8bit(x, packed, scheme=scheme, out_features=12))

    x = torch.randn(3, 40, requires_grad=True)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    want = Layer()(x)
    torch.testing.assert_close(compiled(x), want)
    got = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x))
    exported = torch.export.export(Layer(), (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_zero": 3},
            "input_scale, and input_zero beside it, go with scheme 'w8a8', got .* input_scale None",
        ),
        ({"input_scale": 0.1, "scheme": "w8a16"}, "go with scheme 'w8a8', got scheme 'w8a16'"),
        ({"input_scale": 0.0}, "input_scale is above 0 and finite, input_zero from -127 to 127, got 0.0 and 0"),
        ({"input_scale": 0.1, "input_zero": 128}, "input_zero from -127 to 127, got 0.1 and 128"),
        ({"scheme": "w8a9"}, "unknown 8-bit scheme 'w8a9': did you mean 'w8a8'"),
        ({"x": torch.zeros(2, 24, dtype=torch.int32)}, "x must be floating point"),
        ({"x": torch.zeros(())}, "x must be floating point"),
        ({"qweight": torch.zeros(6, 24)}, r"qweight must be int8 \[out_features, 24\]"),
        ({"x": torch.zeros(2, 25)}, r"qweight must be int8 \[out_features, 25\] to fit x"),
        ({"scales": torch.ones(5)}, r"scales and bias must have shape \[6\]"),
        ({"bias": torch.ones(5)}, r"scales and bias must have shape \[6\]"),
        ({"x": torch.zeros(2, 24, device="meta")}, "x is on meta and qweight on cpu: move them to one device"),
        ({"scales": None, "out_features": 6}, r"a weight in the CPU layout for 6 x 24 is uint8 \[1024\]"),
        (
            {
                "x": torch.zeros(1, 131073),
                "qweight": torch.zeros(256 + 32 * 131076, dtype=torch.uint8),
                "scales": None,
                "out_features": 1,
            },
            "the CPU layout is for at most 131072 inputs, whose sums fit in 32 bits, got 131073",
        ),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    tensors, _ = make(6, 24)
    call = {"x": torch.zeros(2, 24), "qweight": tensors.qweight, "scales": tensors.scales, **change}
    with pytest.raises(ValueError, match=message):
        linear_8bit(**call)
