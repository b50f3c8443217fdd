"""The pruned w8a8 layer gives the bits of the dense one, whatever is pruned, at every instruction-set level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from pykd.nn.codecs.eight_bit import quantize_8bit
from pykd.ops.bitmask import pack_bits
from pykd.ops.dispatch import native
from pykd.ops.int8_r16 import pack_r16
from pykd.ops.linear_8bit import linear_8bit
from pykd.ops.sparse_8bit import least_rows, pack_codes, sparse_8bit, unpack_codes

pytestmark = pytest.mark.skipif(native is None, reason="panels of codes are the native kernel's")


def pruned(out: int, columns: int, density: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of a pruned weight."""
    weight = torch.randn(out, columns) * (torch.rand(out, columns) < density)
    return tuple(quantize_8bit(weight))


def panels_of(codes: Tensor) -> Tensor:
    return pack_codes(codes, pack_bits(codes != 0))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (130, 259), (129, 40), (260, 1100), (2, 70_001)], ids=str)
def test_the_bits_of_the_dense_layer(isa: str, shape: tuple[int, int], density: float) -> None:
    codes, scales = pruned(*shape, density)
    panels, packed, bias = panels_of(codes), pack_r16(codes, scales), torch.randn(shape[0])
    for rows in (1, 3, 17, 70, 250):
        x = torch.randn(rows, shape[1]) * 10
        want = linear_8bit(x, packed, bias=bias, out_features=shape[0], activation="gelu")
        assert torch.equal(sparse_8bit(x, panels, scales, bias=bias, activation="gelu"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_shapes_of_x(isa: str, dtype: torch.dtype) -> None:
    codes, scales = pruned(33, 70, 0.3)
    panels, bias = panels_of(codes), torch.randn(33, dtype=torch.bfloat16)
    inputs = (
        torch.randn(70),
        torch.randn(2, 3, 70),
        torch.randn(0, 70),
        torch.randn(70, 40).T,
        torch.randn(20, 140)[:, ::2],
    )
    for x in inputs:
        x = x.to(dtype)
        want = linear_8bit(x, pack_r16(codes, scales), bias=bias, out_features=33)
        got = sparse_8bit(x, panels, scales, bias=bias)
        assert got.dtype == dtype and got.shape == (*x.shape[:-1], 33) and torch.equal(got, want)


def test_rows_that_are_not_finite_are_nan_and_leave_others_alone(isa: str) -> None:
    codes, scales = pruned(40, 64, 0.3)
    for rows in (1, 40):
        x = torch.randn(rows, 64)
        x[-1, 5] = float("inf")
        y = sparse_8bit(x, panels_of(codes), scales)
        assert y[-1].isnan().all() and y[:-1].isfinite().all()
    assert torch.equal(sparse_8bit(torch.zeros(20, 64), panels_of(codes), scales), torch.zeros(20, 40))


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    codes, scales = pruned(700, 520, 0.2)
    panels, x, before = panels_of(codes), torch.randn(40, 520), torch.get_num_threads()
    results = []
    try:
        for threads in (2, 1, 3, 5):
            torch.set_num_threads(threads)
            results.append(sparse_8bit(x, panels, scales))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@settings(max_examples=40, deadline=None)
@given(out=st.integers(0, 300), columns=st.integers(1, 300), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_packs_come_back(out: int, columns: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8, generator=generator)
    codes[torch.rand(out, columns, generator=generator) >= density] = 0
    assert torch.equal(unpack_codes(panels_of(codes), out, columns), codes)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_opcheck_and_compilation(activation: str | None) -> None:
    codes, scales = pruned(9, 14, 0.4)
    panels = panels_of(codes)
    results = []
    for call in (
        lambda x, b: sparse_8bit(x, panels, scales, bias=b, activation=activation),
        lambda x, b: linear_8bit(x, codes, scales, bias=b, activation=activation),
    ):
        torch.manual_seed(1)
        x, bias = torch.randn(2, 3, 14, requires_grad=True), torch.randn(9, requires_grad=True)
        call(x, bias).square().sum().backward()
        results.append((x.grad, bias.grad))
        if len(results) == 1:
            opcheck(torch.ops.pykd.sparse_8bit, (x, panels, scales, bias, activation))
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x, bias), call(x, bias))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_thresholds(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_rows(1.0) == math.inf and least_rows(0.0) == 1
    if isa == "avx2":
        assert [least_rows(density) for density in (0.05, 0.1, 0.3, 0.5, 0.6)] == [2, 8, 16, 16, math.inf]
    monkeypatch.setattr("pykd.ops.sparse_8bit.native", None)
    assert least_rows(0.0) == math.inf


def test_errors() -> None:
    codes, scales = pruned(9, 14, 0.4)
    panels = panels_of(codes)
    with pytest.raises(TypeError, match=r"sparse_8bit takes float32, bfloat16 or float16; x is torch.float64"):
        sparse_8bit(torch.randn(2, 14).double(), panels, scales)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(out_features,\) = \(9,\)"):
        sparse_8bit(torch.randn(2, 14), panels, scales, bias=torch.randn(3))
    with pytest.raises(
        ValueError, match=r"the pack is of another weight: \[9, 14\] in packing ([23]), not \[9, 15\] in \1"
    ):
        sparse_8bit(torch.randn(2, 15), panels, scales)
    with pytest.raises(ValueError, match="the pack is of another weight"):
        unpack_codes(panels, 8, 14)
