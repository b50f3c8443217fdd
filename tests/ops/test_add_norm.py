"""Layer normalisation of a sum: against float64 and torch, at every instruction-set level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.ops.add_norm import add_norm


def in_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)


def check(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> None:
    parts = (x, residual, weight, bias)
    want = in_torch(*(part.double() for part in parts), eps)
    with torch.inference_mode():
        got = add_norm(*parts, eps=eps)
    assert got.shape == x.shape and got.dtype == x.dtype
    off, theirs = (got.double() - want).abs().max(), (in_torch(*parts, eps).double() - want).abs().max()
    # The sum and its mean are rounded to float32 before their difference is taken.
    total = x.double() + residual.double()
    rounded = 2 * 2**-24 * total.abs().amax(-1) / (total.var(-1, correction=0) + eps).sqrt() * weight.abs().max()
    assert off <= theirs + 1e-6 * want.abs().max() + rounded.max(), (float(off), float(theirs))


@pytest.mark.parametrize("features", [1, 3, 16, 17, 63, 64, 130, 768])
def test_as_close_as_torch(isa: str, features: int) -> None:
    for rows in (1, 5):
        x, residual = torch.randn(2, rows, features)
        check(x, residual, torch.randn(features), torch.randn(features))
    check(torch.randn(2, 3, features) + 50, torch.randn(2, 3, features), torch.ones(features), torch.zeros(features))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from([1e-12, 1e-5]), st.integers(0, 1000))
def test_any_shape(rows: int, features: int, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, residual = torch.randn(2, rows, features + 1)
    check(x, residual, torch.randn(features + 1), torch.randn(features + 1), eps)


def test_rows_that_are_all_alike_are_the_bias(isa: str) -> None:
    bias = torch.randn(40)
    with torch.inference_mode():
        got = add_norm(torch.full((2, 40), 3.0), torch.full((2, 40), -3.0), torch.randn(40), bias)
    assert torch.equal(got, bias.expand(2, 40))


def test_nan_stays_in_its_row(isa: str) -> None:
    x = torch.randn(3, 20)
    x[1, 4] = torch.nan
    with torch.inference_mode():
        got = add_norm(x, torch.randn(3, 20), torch.ones(20), torch.zeros(20))
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_the_same_bits_with_any_number_of_threads(isa: str) -> None:
    x, residual = torch.randn(2, 301, 129)
    weight, bias, threads, found = torch.randn(129), torch.randn(129), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with torch.inference_mode():
                found.append(add_norm(x, residual, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_the_kernel_does_not_take_is_torchs() -> None:
    weight, bias = torch.randn(8), torch.randn(8)
    x, residual = torch.randn(2, 8, 3).transpose(1, 2), torch.randn(2, 3, 8)
    assert torch.equal(add_norm(x, residual, weight, bias), in_torch(x, residual, weight, bias))
    parts = [part.bfloat16() for part in (x, residual, weight, bias)]
    assert torch.equal(add_norm(*parts), in_torch(*parts))
    assert add_norm(torch.randn(0, 8), torch.randn(0, 8), weight, bias).shape == (0, 8)


def test_gradients_and_parameters() -> None:
    parts = tuple(
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (2, 5), (5,), (5,))
    )
    assert torch.autograd.gradcheck(add_norm, parts)
    norm = torch.nn.LayerNorm(8)
    x, residual = torch.randn(2, 3, 8)
    assert add_norm(x, residual, norm.weight, norm.bias).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(add_norm(x, residual, norm.weight, norm.bias), norm(x + residual))


def test_compiles_whole() -> None:
    compiled = torch.compile(add_norm, fullgraph=True, backend="aot_eager")
    parts = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8), torch.randn(8)
    torch.testing.assert_close(compiled(*parts), in_torch(*parts))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"must be alike.*got \(2, 8\), \(2, 7\), \(8,\), \(8,\)"):
        add_norm(torch.ones(2, 8), torch.ones(2, 7), torch.ones(8), torch.ones(8))
    with pytest.raises(ValueError, match="as long as their last dimension"):
        add_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(7), torch.ones(7))
