"""HQQ: lower in its own norm than plain rounding, group by group, for every code and shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.nn.codecs.four_bit import FourBit, dequantize_4bit, split_groups
from pykd.ops.int4_r16 import CODES
from pykd.quantization.hqq import hqq
from pykd.quantization.rtn import rtn


def group_norms(weight: Tensor, tensors: FourBit, norm: float, **options: Any) -> Tensor:
    dense = dequantize_4bit(tensors, in_features=weight.shape[1], **options)
    return split_groups((dense - weight).abs(), options["group_size"]).pow(norm).sum(2)


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_lower_in_its_own_norm(code: str, norm: float) -> None:
    weight = torch.distributions.StudentT(3.0).sample((64, 256)) * 0.05
    options: Any = {"code": code, "group_size": 64}
    found = group_norms(weight, hqq(weight, norm=norm, **options), norm, **options)
    plain = group_norms(weight, rtn(weight, **options), norm, **options)
    assert (found <= plain * (1 + 1e-6)).all() and found.sum() < 0.997 * plain.sum()


def test_iterations_pay_and_zero_points_move() -> None:
    weight = torch.randn(32, 128).exp() * 0.1  # skewed
    options: Any = {"code": "uint4", "group_size": 32}
    sums = [group_norms(weight, hqq(weight, iterations=n, **options), 0.7, **options).sum() for n in (1, 20)]
    assert sums[1] < 0.99 * sums[0]
    shifted = weight - 0.15
    assert not torch.equal(hqq(shifted, **options).zeros, rtn(shifted, **options).zeros)  # type: ignore[arg-type]


@given(
    columns=st.integers(1, 90),
    rows=st.integers(1, 6),
    group=st.integers(1, 100),
    code=st.sampled_from(sorted(CODES)),
    zeros=st.sampled_from([0.0, 0.6, 1.0]),
    size=st.sampled_from([1e-7, 0.02, 4e3]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_keeps_zeros_and_is_no_worse(
    columns: int, rows: int, group: int, code: str, zeros: float, size: float
) -> None:
    torch.manual_seed(columns * 10 + rows)
    weight = torch.randn(rows, columns) * size
    weight[torch.rand_like(weight) < zeros] = 0
    options: Any = {"code": code, "group_size": group}
    found, plain = hqq(weight, **options), rtn(weight, **options)
    dense = dequantize_4bit(found, in_features=columns, **options)
    assert found.qweight.shape == plain.qweight.shape and found.scales.shape == plain.scales.shape
    assert bool((dense[weight == 0] == 0).all()) and bool(dense.isfinite().all())
    got, least = (group_norms(weight, tensors, 0.7, **options) for tensors in (found, plain))
    assert bool((got <= least * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("wrong", [{"norm": 0.0}, {"norm": 1.5}, {"beta": 0.0}, {"growth": 0.9}, {"iterations": 0}])
def test_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"norm lies in \(0, 1\], beta above 0, growth and iterations at 1 or above"):
        hqq(torch.ones(2, 4), code="int4", group_size=4, **wrong)  # type: ignore[arg-type]
