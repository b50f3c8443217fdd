"""AWQ in plain codes: no row worse than plain rounding, much better where a few inputs are large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.calibration.inputs import Inputs
from pykd.nn.codecs.four_bit import dequantize_4bit
from pykd.ops.int4_r16 import CODES
from pykd.quantization.awq import awq
from pykd.quantization.output_error import output_error
from pykd.quantization.rtn import rtn


def statistics(x: Tensor) -> Inputs:
    """Of rows [blocks, rows, columns]."""
    return Inputs(x.transpose(1, 2) @ x * (2 / x.shape[1]), x.shape[1])


@pytest.mark.parametrize("code", sorted(CODES))
def test_large_inputs_are_protected(code: str) -> None:
    sizes = torch.ones(128)
    sizes[::16] = 12.0
    inputs, weight = statistics(torch.randn(1, 500, 128) * sizes), torch.randn(32, 128)
    options: Any = {"code": code, "group_size": 32}
    found, plain = awq(weight, inputs, **options), rtn(weight, **options)
    error, least = (output_error(weight, tensors, inputs.hessian, **options) for tensors in (found, plain))
    assert (error <= least).all() and error.sum() < 0.5 * least.sum()
    moved = (dequantize_4bit(found, in_features=128, **options) - weight).abs()[:, ::16].mean()
    assert moved < 0.6 * (dequantize_4bit(plain, in_features=128, **options) - weight).abs()[:, ::16].mean()


@given(
    columns=st.integers(1, 70),
    rows=st.integers(1, 5),
    group=st.integers(1, 80),
    blocks=st.integers(1, 3),
    code=st.sampled_from(sorted(CODES)),
    zeros=st.sampled_from([0.0, 0.6, 1.0]),
    seen=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_keeps_zeros_and_is_no_worse(
    columns: int, rows: int, group: int, blocks: int, code: str, zeros: float, seen: bool
) -> None:
    torch.manual_seed(columns * 100 + rows)
    weight = torch.randn(rows * blocks, columns)
    weight[torch.rand_like(weight) < zeros] = 0
    x = torch.randn(blocks, 50, columns) @ torch.randn(blocks, columns, columns) * seen
    x[:, :, ::4] = 0  # inputs that are never active
    inputs = statistics(x)
    options: Any = {"code": code, "group_size": group}
    found, plain = awq(weight, inputs, **options), rtn(weight, **options)
    dense = dequantize_4bit(found, in_features=columns, **options)
    assert found.qweight.shape == plain.qweight.shape and found.scales.shape == plain.scales.shape
    assert bool((dense[weight == 0] == 0).all()) and bool(dense.isfinite().all())
    error, least = (output_error(weight, tensors, inputs.hessian, **options) for tensors in (found, plain))
    assert bool((error <= least).all())


def test_sweeps_pay() -> None:
    x = torch.randn(1, 400, 96) @ (torch.randn(1, 96, 96) * torch.logspace(0, -1.5, 96)[:, None])
    inputs, weight = statistics(x), torch.randn(24, 96)
    options: Any = {"code": "int4", "group_size": 16}
    sums = [output_error(weight, awq(weight, inputs, sweeps=n, **options), inputs.hessian, **options) for n in (1, 3)]
    assert sums[1].sum() < 0.98 * sums[0].sum()


def test_errors() -> None:
    inputs = statistics(torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        awq(torch.ones(2, 8), inputs, code="int4", group_size=8, sweeps=0)
    with pytest.raises(ValueError, match=r"a hessian \[blocks, 9, 9\] whose blocks divide 2 outputs fits this weight"):
        awq(torch.ones(2, 9), inputs, code="int4", group_size=8)
