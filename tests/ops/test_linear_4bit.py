"""linear_4bit against float64 with the dequantized weight, at every instruction-set level, and as a torch operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.ops.dispatch import native
from pykd.ops.int4_r16 import CODES, codebook_code, dequantize, pack_r16
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_4bit_reference import linear_4bit_reference

SHAPES = [(40, 67, 32), (32, 64, 32), (1, 1, 32), (33, 100, 20), (70, 200, 128), (64, 300, 1000), (129, 255, 64)]


def make(out: int, features: int, group: int, code: str) -> tuple[FourBit, Tensor, Tensor]:
    """Canonical tensors, the CPU layout, and the dense weight in float64."""
    tensors = quantize_4bit(torch.randn(out, features), code=code, group_size=group)
    packed = pack_r16(*tensors, in_features=features, group_size=group)
    return tensors, packed, dequantize(*tensors, code=code, in_features=features, group_size=group).double()


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """No further from float64 than torch at the same dtype, plus rounding of the sum of magnitudes."""
    wide = None if bias is None else bias.double()
    want = F.linear(x.double(), weight, wide)
    same = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    size = F.linear(x.double().abs(), weight.abs(), None if wide is None else wide.abs())
    eps = torch.finfo(x.dtype).eps
    allowed = (same.double() - want).abs() + eps * want.abs() + 4e-7 * size + 1e-30
    wrong = ((got.double() - want).abs() > allowed).nonzero()
    assert got.dtype == x.dtype
    assert len(wrong) == 0, [(tuple(i), got[tuple(i)].item(), want[tuple(i)].item()) for i in wrong[:3].tolist()]


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(isa: str, shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    _, packed, weight = make(out, features, group, code)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 50):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16)[rows % 2]):
            x = torch.randn(rows, features).to(dtype)
            bias = None if rows == 2 else torch.randn(out).to(torch.float32 if rows < 5 else dtype)
            y = linear_4bit(x, packed, bias=bias, code=code, out_features=out, group_size=group)
            assert_close(y, x, weight, bias)


#: Numbers that bfloat16 holds, unlike those of nf4 and fp4.
BF16_TABLE = codebook_code([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.125, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("code", ["int4", "uint4", BF16_TABLE], ids=["int4", "uint4", "table"])
def test_bfloat16_activations(isa: str, code: str) -> None:
    for out, features, group in [(70, 67, 32), (33, 300, 20), (1, 1, 32), (64, 520, 520)]:
        _, packed, weight = make(out, features, group, code)
        for rows in (1, 3, 8, 9, 31, 256, 400):
            x = torch.randn(rows, features).bfloat16()
            bias = torch.randn(out) if rows == 9 else None
            y = linear_4bit(x, packed, bias=bias, code=code, out_features=out, group_size=group)
            assert_close(y, x, weight, bias)
    x = torch.randn(2, 67).bfloat16()
    _, packed, weight = make(40, 67, 32, code)
    x[0, 5], x[1, 66] = torch.nan, torch.inf
    want = F.linear(x.float(), weight.float()).bfloat16()
    got = linear_4bit(x, packed, code=code, out_features=40, group_size=32)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("code", ["int4", "nf4"])
def test_many_rows(isa: str, code: str) -> None:
    _, packed, weight = make(65, 40, 32, code)
    x = torch.randn(800, 40)  # more than one block of activations
    assert_close(linear_4bit(x, packed, code=code, out_features=65, group_size=32), x, weight, None)


@pytest.mark.parametrize("code", sorted(CODES))
def test_canonical_layout_and_float64_run_the_reference(code: str) -> None:
    tensors, packed, weight = make(33, 50, 16, code)
    x = torch.randn(3, 50)
    qweight, scales, zeros = tensors
    y = linear_4bit(x, qweight, scales, zeros=zeros, code=code, group_size=16)
    assert torch.equal(y, linear_4bit_reference(x, qweight, scales, zeros, None, code, 16))
    wide = linear_4bit(x.double(), packed, code=code, out_features=33, group_size=16)
    torch.testing.assert_close(wide, F.linear(x.double(), weight), rtol=1e-12, atol=1e-12)


def test_shapes_of_x(isa: str) -> None:
    _, packed, weight = make(20, 48, 32, "int4")
    options: dict[str, Any] = {"out_features": 20}
    base = torch.randn(4, 6, 48)
    for x in (
        base,
        base[0, 0],
        base[:, ::2],
        base.transpose(0, 1),
        torch.randn(48, 5).t(),
        torch.randn(9, 100)[:, 7:55],
    ):
        y = linear_4bit(x, packed, **options)
        assert y.shape == (*x.shape[:-1], 20)
        assert_close(y, x, weight, None)
    for empty in (torch.randn(0, 48), torch.randn(3, 0, 48)):
        assert linear_4bit(empty, packed, **options).shape == (*empty.shape[:-1], 20)


def test_extreme_activations(isa: str) -> None:
    _, packed, weight = make(32, 64, 32, "int4")
    for size in (1e30, 1e-30, 1e4):
        x = torch.randn(2, 64) * size
        assert_close(linear_4bit(x, packed, out_features=32), x, weight, None)
    x = torch.randn(2, 64)
    x[0, 5] = torch.nan
    y = linear_4bit(x, packed, out_features=32)
    assert y[0].isnan().all() and y[1].isfinite().all()
    x[0, 5] = torch.inf
    want = F.linear(x, weight.float())
    torch.testing.assert_close(linear_4bit(x, packed, out_features=32), want, equal_nan=True)


def test_levels_agree() -> None:
    if native is None:
        raise AssertionError("the native module is missing")
    _, packed, _ = make(64, 256, 64, "nf4")
    x = torch.randn(5, 256)
    before, results = native.isa(), []
    for level in native.isa_levels():
        native.set_isa(level)
        results.append(linear_4bit(x, packed, code="nf4", out_features=64, group_size=64))
    native.set_isa(before)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    _, packed, _ = make(300, 256, 32, "int4")
    x = torch.randn(13, 256).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_4bit(x, packed, out_features=300))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("layout", ["packed", "canonical"])
@pytest.mark.parametrize("code", ["int4", "uint4", "nf4"])
def test_gradient_is_that_of_the_dequantized_layer(code: str, layout: str) -> None:
    tensors, packed, weight = make(12, 40, 16, code)
    x, bias = torch.randn(3, 2, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    if layout == "packed":
        y = linear_4bit(x, packed, bias=bias, code=code, out_features=12, group_size=16)
    else:
        y = linear_4bit(x, tensors.qweight, tensors.scales, zeros=tensors.zeros, bias=bias, code=code, group_size=16)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    want = torch.autograd.grad(F.linear(x, weight.float(), bias), (x, bias), grad)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("code", ["uint4", "nf4"])
def test_opcheck(code: str) -> None:
    tensors, packed, _ = make(12, 40, 16, code)
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(torch.ops.pykd.linear_4bit.default, (x, packed, None, None, bias, code, 12, 16))
    torch.library.opcheck(torch.ops.pykd.linear_4bit.default, (x, *tensors, None, code, 12, 16))
    torch.library.opcheck(torch.ops.pykd.dequantize_4bit.default, (packed, None, None, code, 12, 40, 16))


def test_compiles_as_one_graph_and_exports() -> None:
    _, packed, _ = make(12, 40, 32, "int4")

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(linear_4bit(x, packed, out_features=12))

    x = torch.randn(3, 40, requires_grad=True)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    want = Layer()(x)
    torch.testing.assert_close(compiled(x), want)
    got = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x))
    exported = torch.export.export(Layer(), (x.detach(),))
    torch.testing.assert_close(exported.module()(x.detach()), want)


def test_under_autocast() -> None:
    _, packed, weight = make(12, 40, 32, "int4")
    x = torch.randn(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(linear_4bit(x, packed, out_features=12), x, weight, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": "nf5"}, "unknown 4-bit code 'nf5': did you mean 'nf4'"),
        ({"x": torch.zeros(2, 40, dtype=torch.int64)}, "x must be floating point"),
        ({"x": torch.zeros(())}, "x must be floating point"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[12\], one per output, got \[3\]"),
        ({"x": torch.zeros(2, 41)}, r"x with 41 features and group_size 16 needs qweight \[12, 21\]"),
        ({"code": "uint4"}, "go with code 'uint4' and with no other code"),
        ({"scales": None, "out_features": 12}, "a weight in the CPU layout for 12 x 40"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    tensors, _, _ = make(12, 40, 16, "int4")
    call = {"x": torch.zeros(2, 40), "qweight": tensors.qweight, "scales": tensors.scales, "group_size": 16, **change}
    with pytest.raises(ValueError, match=message):
        linear_4bit(**call)
