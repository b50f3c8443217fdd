"""linear_8bit against integer arithmetic in float64, and as a torch operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pykd.nn.codecs.eight_bit import EightBit, quantize_8bit
from pykd.ops import linear_8bit as module
from pykd.ops.linear_8bit import linear_8bit, quantize_rows


def exact(x: Tensor, tensors: EightBit, bias: Tensor | None = None) -> Tensor:
    codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    y = codes.double() @ tensors.qweight.double().t() * scales.double() * tensors.scales.double()
    return (y if bias is None else y + bias.double()).view(*x.shape[:-1], len(tensors.scales))


@pytest.mark.parametrize("vnni", [False, True], ids=["reference", "int_mm"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 67, 33), (17, 513, 129), (5, 64, 32), (0, 8, 8)], ids=str)
def test_matches_integer_arithmetic(shape: tuple[int, int, int], vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VNNI", vnni)
    rows, features, out = shape
    tensors, bias = quantize_8bit(torch.randn(out, features)), torch.randn(out)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        x = torch.randn(rows, features).to(dtype)
        y = linear_8bit(x, *tensors, bias=bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact(x, tensors, bias), rtol=tolerance, atol=tolerance)


def test_the_rounding_is_within_its_bound() -> None:
    weight, x = torch.randn(20, 100), torch.randn(7, 100)
    y = linear_8bit(x, *quantize_8bit(weight)).double()
    step_x, step_w = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1) / 254
    bound = step_x * weight.abs().sum(1) + step_w * x.abs().sum(1, keepdim=True) + 100 * step_x * step_w
    assert ((y - x.double() @ weight.double().t()).abs() <= bound * 1.001).all()


def test_rows_of_x_are_scaled_alone_and_bad_rows_stay_bad() -> None:
    tensors = quantize_8bit(torch.randn(4, 16))
    x = torch.stack([torch.randn(16), torch.randn(16) * 1e6, torch.zeros(16), torch.full((16,), torch.inf)])
    x[3, 2] = torch.nan
    y = linear_8bit(x, *tensors)
    assert torch.equal(y[0], linear_8bit(x[0], *tensors))
    assert torch.equal(y[2], torch.zeros(4)) and y[3].isnan().all()


def test_strided_and_stacked_x() -> None:
    tensors = quantize_8bit(torch.randn(6, 24))
    for x in (torch.randn(2, 3, 24), torch.randn(24, 5).t(), torch.randn(24)):
        torch.testing.assert_close(linear_8bit(x, *tensors).double(), exact(x, tensors), rtol=1e-5, atol=1e-5)


def test_gradient_opcheck_and_compile() -> None:
    tensors, bias = quantize_8bit(torch.randn(6, 24)), torch.randn(6, requires_grad=True)
    x = torch.randn(2, 3, 24, requires_grad=True)
    grad = torch.randn(2, 3, 6)
    dx, db = torch.autograd.grad(linear_8bit(x, *tensors, bias=bias), (x, bias), grad)
    torch.testing.assert_close(dx, grad @ (tensors.qweight * tensors.scales.unsqueeze(1)))
    torch.testing.assert_close(db, grad.sum((0, 1)))
    torch.library.opcheck(torch.ops.pykd.linear_8bit.default, (x, *tensors, bias))
    compiled = torch.compile(linear_8bit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *tensors, bias=bias), linear_8bit(x, *tensors, bias=bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24, dtype=torch.int32)}, "x must be floating point"),
        ({"qweight": torch.zeros(6, 24)}, r"qweight must be int8 \[out_features, 24\]"),
        ({"x": torch.zeros(2, 25)}, r"qweight must be int8 \[out_features, 25\] to fit x"),
        ({"scales": torch.ones(5)}, r"scales and bias must have shape \[6\]"),
        ({"bias": torch.ones(5)}, r"scales and bias must have shape \[6\]"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    tensors = quantize_8bit(torch.randn(6, 24))
    call = {"x": torch.zeros(2, 24), "qweight": tensors.qweight, "scales": tensors.scales, **change}
    with pytest.raises(ValueError, match=message):
        linear_8bit(**call)
