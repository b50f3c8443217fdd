"""Rounding to int8: exact zeros, the error bound, bad input."""

from __future__ import annotations

import pytest
import torch

from pykd.nn.codecs.eight_bit import dequantize_8bit, quantize_8bit


def test_error_is_within_half_a_step_and_zeros_stay() -> None:
    weight = torch.randn(33, 70)
    weight[torch.rand(33, 70) < 0.5] = 0
    weight[3] = 0
    dense = dequantize_8bit(quantize_8bit(weight))
    assert ((dense - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert (dense[weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2), "weight must be a non-empty floating-point matrix"),
        (torch.ones(0, 2), "weight must be a non-empty floating-point matrix"),
        (torch.tensor([[torch.inf]]), "weight holds NaN or infinite values"),
    ],
)
def test_errors(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_8bit(weight)
