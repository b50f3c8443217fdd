"""GPTQ: the textbook algorithm where nothing was added, never worse than plain rounding, better on real inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.calibration.hessian import damped
from pykd.calibration.inputs import Inputs
from pykd.nn.codecs.four_bit import dequantize_4bit, nearest_levels, quantize_4bit, split_groups
from pykd.ops.int4_r16 import CODES
from pykd.quantization.gptq import _descended, gptq
from pykd.quantization.grid import Grid
from pykd.quantization.output_error import output_error
from pykd.quantization.rtn import rtn


def statistics(x: Tensor) -> Inputs:
    """Of rows [blocks, rows, columns]."""
    return Inputs(x.transpose(1, 2) @ x * (2 / x.shape[1]), x.shape[1])


def correlated(columns: int, *, blocks: int = 1, rows: int = 600) -> Tensor:
    decay = torch.logspace(0, -1.5, columns)
    return torch.randn(blocks, rows, columns) @ (torch.randn(blocks, columns, columns) * decay[:, None]) + 0.2


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("code", sorted(CODES))
def test_independent_inputs_give_plain_rounding(code: str, order: bool) -> None:
    weight = torch.randn(12, 50)
    inputs = Inputs(torch.diag(torch.rand(50) + 0.5)[None], 9)
    found = gptq(weight, inputs, code=code, group_size=16, activation_order=order)
    dense = dequantize_4bit(found, code=code, in_features=50, group_size=16)
    groups, scale = split_groups(weight, 16), found.scales.float()[:, :, None]
    zero = None
    if found.zeros is not None:
        zero = torch.stack((found.zeros & 15, found.zeros >> 4), dim=2).flatten(1)[:, :4, None].float()
    nearest = (nearest_levels(groups, scale, zero, code=code) * scale).flatten(1)[:, :50]
    torch.testing.assert_close(dense, nearest, rtol=1e-6, atol=1e-6)


def test_one_pass_is_algorithm_1() -> None:
    """Against the published steps in float64: explicit inverse, one column after another, no blocks."""
    weight, inputs = torch.randn(6, 160), statistics(correlated(160))
    found = gptq(weight, inputs, code="int4", group_size=160, activation_order=False, passes=1, sweeps=0)
    scale = found.scales.double()
    hessian = inputs.hessian[0].double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work, rounded = weight.double(), torch.zeros(6, 160, dtype=torch.float64)
    for column in range(160):
        rounded[:, column] = (work[:, column] / scale[:, 0]).round().clamp(-8, 7) * scale[:, 0]
        error = (work[:, column] - rounded[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    dense = dequantize_4bit(found, code="int4", in_features=160, group_size=160).double()
    same = (dense - rounded).abs().amax(1) < 1e-4
    assert same.sum() >= 5, "float32 may break a tie in one row, not in more"


@pytest.mark.parametrize("code", sorted(CODES))
def test_output_error_is_far_below_plain_rounding(code: str) -> None:
    weight, inputs = torch.randn(32, 96), statistics(correlated(96))
    options: Any = {"code": code, "group_size": 32}
    error = output_error(weight, gptq(weight, inputs, **options), inputs.hessian, **options)
    plain = output_error(weight, rtn(weight, **options), inputs.hessian, **options)
    assert (error <= plain).all() and error.sum() < 0.6 * plain.sum()


def test_output_error_is_what_the_layer_makes() -> None:
    x, weight = correlated(40), torch.randn(8, 40)
    tensors = quantize_4bit(weight, code="nf4", group_size=16)
    dense = dequantize_4bit(tensors, code="nf4", in_features=40, group_size=16)
    want = 2 * (x[0].double() @ (weight - dense).T.double()).square().mean(0)
    got = output_error(weight, tensors, statistics(x).hessian, code="nf4", group_size=16)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_passes_and_order_pay() -> None:
    weight, inputs = torch.randn(48, 128), statistics(correlated(128))
    options: Any = {"code": "int4", "group_size": 32}

    def total(**more: Any) -> float:
        return float(output_error(weight, gptq(weight, inputs, **options, **more), inputs.hessian, **options).sum())

    assert total(passes=3) < 0.98 * total(passes=1)
    assert total(sweeps=4) < total(sweeps=1) < 0.99 * total(sweeps=0)
    assert total(passes=1) != total(passes=1, activation_order=False)


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("columns", [37, 150, 300])
def test_descent_never_makes_an_output_worse(columns: int, code: str) -> None:
    """Across blocks too: from any levels, every sweep lowers e H e^T of every row or leaves it."""
    weight, hessian = torch.randn(6, columns), damped(statistics(correlated(columns, blocks=2)).hessian, 0.01)
    grid, target = Grid(code, 16, columns), weight.view(2, 3, columns)
    scales = grid.search(target)
    levels = grid.levels(target + 0.5 * torch.randn_like(target), scales)

    def errors(levels: Tensor) -> Tensor:
        e = (target - levels * grid.spread(scales[0])).double()
        return ((e @ hessian.double()) * e).sum(2)

    seen = [errors(levels)]
    for _ in range(25):
        levels = _descended(target, hessian, grid, levels, scales, 1)
        seen.append(errors(levels))
        assert bool((seen[-1] <= seen[-2] * (1 + 1e-4)).all())
    assert bool((seen[1] < 0.7 * seen[0]).all())
    again = _descended(target, hessian, grid, grid.levels(target, scales), scales, 0)
    assert torch.equal(again, grid.levels(target, scales))


@given(
    columns=st.integers(1, 70),
    rows=st.integers(1, 5),
    group=st.integers(1, 80),
    blocks=st.integers(1, 3),
    code=st.sampled_from(sorted(CODES)),
    zeros=st.sampled_from([0.0, 0.6, 1.0]),
    seen=st.sampled_from([0, 3, 200]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_keeps_zeros_and_is_no_worse(
    columns: int, rows: int, group: int, blocks: int, code: str, zeros: float, seen: int
) -> None:
    torch.manual_seed(columns * 100 + rows)
    weight = torch.randn(rows * blocks, columns)
    weight[torch.rand_like(weight) < zeros] = 0
    x = correlated(columns, blocks=blocks, rows=max(seen, 1)) * bool(seen)
    x[:, :, ::4] = 0  # inputs that are never active
    inputs, options = statistics(x), {"code": code, "group_size": group}
    found = gptq(weight, inputs, **options)  # type: ignore[arg-type]
    plain = rtn(weight, **options)  # type: ignore[arg-type]
    assert found.qweight.shape == plain.qweight.shape and found.scales.shape == plain.scales.shape
    dense = dequantize_4bit(found, in_features=columns, **options)  # type: ignore[arg-type]
    assert bool((dense[weight == 0] == 0).all()) and bool(dense.isfinite().all())
    error, least = (output_error(weight, t, inputs.hessian, **options) for t in (found, plain))  # type: ignore[arg-type]
    assert bool((error <= least).all())


def test_the_same_twice_and_from_half_precision() -> None:
    weight, inputs = torch.randn(8, 64).to(torch.bfloat16), statistics(correlated(64))
    options: Any = {"code": "uint4", "group_size": 16}
    first, again = (gptq(w, inputs, **options) for w in (weight.T.contiguous().T, weight.float()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)


def test_errors() -> None:
    inputs = statistics(correlated(8))
    options: Any = {"code": "int4", "group_size": 8}
    for wrong in ({"damping": 0.0}, {"passes": 0}, {"sweeps": -1}):
        with pytest.raises(ValueError, match="damping must be above 0, passes at least 1 and sweeps at least 0, got"):
            gptq(torch.ones(2, 8), inputs, **options, **wrong)
    with pytest.raises(
        ValueError, match=r"a hessian \[blocks, 9, 9\] whose blocks divide 2 outputs .* got \[1, 8, 8\]"
    ):
        gptq(torch.ones(2, 9), inputs, **options)
    with pytest.raises(ValueError, match=r"whose blocks divide 3 outputs fits this weight, got \[2, 8, 8\]"):
        gptq(torch.ones(3, 8), statistics(correlated(8, blocks=2)), **options)
