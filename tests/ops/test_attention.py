"""Attention of encoders: against torch in float64, at every instruction-set level, and torch's own elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.ops import attention as op
from pykd.ops.attention import attention


def in_torch(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None, bias: Tensor | None) -> Tensor:
    parts = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def check(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None, bias: Tensor | None = None) -> None:
    """No further from float64 than torch at the element of the largest error, and a little."""
    want = in_torch(q.double(), k.double(), v.double(), heads, scale, bias)
    with torch.inference_mode():
        got = attention(q, k, v, heads=heads, scale=scale, bias=bias)
    assert got.shape == q.shape and got.dtype == q.dtype
    allowed = (in_torch(q, k, v, heads, scale, bias).double() - want).abs().max() + 4e-6 * v.abs().max()
    off = (got.double() - want).abs()
    worst = int(off.argmax()) if off.numel() else 0
    assert not off.numel() or off.max() <= allowed, (worst, got.flatten()[worst], want.flatten()[worst])


def padding(batch: int, length: int) -> Tensor:
    """Keys behind a random length are hidden."""
    lengths = torch.randint(1, length + 1, (batch, 1))
    return torch.zeros(batch, length).masked_fill(torch.arange(length) >= lengths, -torch.inf)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 5, 3, 7), (3, 33, 2, 17), (1, 130, 2, 64), (2, 64, 1, 96)], ids=str
)
def test_as_close_as_torch(isa: str, shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, dim = shape
    q, k, v = torch.randn(3, batch, length, heads * dim)
    check(q, k, v, heads)
    check(q, k, v, heads, 0.3, padding(batch, length))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 40), st.integers(0, 1000))
def test_any_shape(batch: int, length: int, heads: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, batch, length, heads * dim)
    check(q, k, v, heads, bias=padding(batch, length))


def test_large_scores_and_scores_far_apart(isa: str) -> None:
    q, k, v = torch.randn(3, 1, 20, 16)
    check(q * 1e4, k, v, 2)
    check(q * 0, k, v, 2)
    check(q, k * 1e-30, v, 2, 1.0, torch.linspace(-200, 0, 20)[None])


def test_slices_of_one_product(isa: str) -> None:
    rows = torch.randn(2, 9, 3 * 24)
    q, k, v = rows.split(24, dim=-1)
    check(q, k, v, 3)
    check(q[:, ::2], k[:, ::2], v[:, ::2], 3)  # every second token
    turned = torch.randn(9, 2, 24).transpose(0, 1)
    check(turned, turned, turned, 3)


def test_the_same_bits_with_any_number_of_threads(isa: str) -> None:
    q, k, v = torch.randn(3, 2, 37, 3 * 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with torch.inference_mode():
                found.append(attention(q, k, v, heads=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_text_of_padding_alone_is_zeros_and_nan_stays(isa: str) -> None:
    if op.native is None:
        pytest.skip("torch's own has NaN for such texts")
    q, k, v = torch.randn(3, 2, 4, 8)
    bias = torch.zeros(2, 4)
    bias[0] = -torch.inf
    q[1, 2, 3] = torch.nan
    with torch.inference_mode():
        y = attention(q, k, v, heads=2, bias=bias)
    assert torch.equal(y[0], torch.zeros(4, 8))
    assert y[1, 2, :4].isnan().all() and y[1, 2, 4:].isfinite().all() and y[1, :2].isfinite().all()


def test_empty() -> None:
    with torch.inference_mode():
        assert attention(*torch.randn(3, 0, 4, 8), heads=2).shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_element_types_are_torchs(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 5, 8).to(dtype)
    bias = padding(2, 5)
    assert torch.equal(attention(q, k, v, heads=2, bias=bias), in_torch(q, k, v, 2, None, bias))


def test_gradients() -> None:
    q, k, v = (torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, heads=3), (q, k, v))
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    found = torch.autograd.grad(attention(q, k, v, heads=3).square().sum(), (q, k, v))
    want = torch.autograd.grad(in_torch(q, k, v, 3, None, None).square().sum(), (q, k, v))
    torch.testing.assert_close(found, want)


def test_compiles_whole() -> None:
    compiled = torch.compile(lambda x: attention(x, x, x, heads=2), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), in_torch(x, x, x, 2, None, None))


def test_errors() -> None:
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"all alike; got \(2, 3, 8\), \(2, 2, 8\), \(2, 3, 8\)"):
        attention(x, x[:, 1:], x, heads=2)
    with pytest.raises(ValueError, match="3 heads do not divide the 8 features"):
        attention(x, x, x, heads=3)
    with pytest.raises(ValueError, match=r"bias must be \(batch, length\) = \(2, 3\), got \(3,\)"):
        attention(x, x, x, heads=2, bias=torch.zeros(3))
