"""Rounding to 4 bits: exact zeros, error bounds, the choice of the scale, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.nn.codecs.four_bit import (
    best_scales,
    dequantize_4bit,
    fitted_scales,
    from_levels,
    int4_scales,
    nearest_levels,
    quantize_4bit,
    range_scales,
    split_groups,
    table_scales,
)
from pykd.ops.int4_r16 import CODEBOOKS, CODES, unpack_nibbles


@given(
    out=st.integers(1, 20),
    features=st.integers(1, 150),
    group=st.integers(1, 160),
    code=st.sampled_from(sorted(CODES)),
    size=st.sampled_from([1e-6, 0.02, 1.0, 5e3]),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    shift=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=120, deadline=None)
def test_zeros_stay_zero(
    out: int, features: int, group: int, code: str, size: float, zeros: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(out * 1000 + features)
    weight = (torch.randn(out, features, generator=generator) + shift) * size
    weight[torch.rand(out, features, generator=generator) < zeros] = 0
    tensors = quantize_4bit(weight, code=code, group_size=group)
    dense = dequantize_4bit(tensors, code=code, in_features=features, group_size=group)
    assert dense.shape == weight.shape
    assert (dense[weight == 0] == 0).all()
    assert not dense[weight == 0].signbit().any() or code == "int4"  # int4 may scale 0 by a negative number


@pytest.mark.parametrize("code", sorted(CODES))
def test_error_is_within_half_a_step(code: str) -> None:
    weight = torch.randn(64, 256)
    groups = weight.view(64, 8, 32)
    dense = dequantize_4bit(quantize_4bit(weight, code=code), code=code, in_features=256, group_size=32)
    error = (dense.view(64, 8, 32) - groups).abs().amax(2)
    largest = groups.abs().amax(2)
    if code in CODEBOOKS:
        levels = torch.tensor(sorted(set(CODEBOOKS[code])))
        bound = largest * (levels[1:] - levels[:-1]).max() / 2
    elif code == "uint4":
        bound = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    else:
        bound = largest / 7
    bound = bound + 0.3 * largest  # fitted scales may cut off the largest weights
    assert (error <= bound * 1.01).all()


@pytest.mark.parametrize(("code", "share"), [("int4", 1.0), ("uint4", 0.96), ("nf4", 0.88), ("fp4", 0.86)])
def test_fitted_scales_beat_those_that_reach_the_extremes(code: str, share: float) -> None:
    torch.manual_seed(0)
    groups = torch.randn(128, 16, 32)
    scale, zero = range_scales(groups) if code == "uint4" else (None, None)
    if code == "int4":
        scale = best_scales(groups, int4_scales(groups), code=code)[0]  # the search among shares
    usual = (table_scales(groups, code) if scale is None else scale).half().float()
    errors = []
    for candidate in ((usual, zero), fitted_scales(groups, code)):
        rounded = nearest_levels(groups, *candidate, code=code) * candidate[0]
        errors.append((rounded - groups).square().sum(2))
    assert code == "int4" or bool((errors[1] <= errors[0]).all())
    assert errors[1].mean() < share * errors[0].mean()


def test_the_scale_search_beats_absmax_over_seven() -> None:
    weight = torch.randn(128, 512)
    groups = weight.view(128, 16, 32)
    scale = (groups.abs().amax(2, keepdim=True) / 7).half().float()
    plain = (groups / scale).round().clamp(-8, 7) * scale
    searched = dequantize_4bit(quantize_4bit(weight), code="int4", in_features=512, group_size=32)
    assert (searched - weight).square().mean() < 0.85 * (plain.flatten(1) - weight).square().mean()


def test_a_weight_that_4_bits_can_hold_is_kept_exactly() -> None:
    codes = torch.randint(-7, 8, (16, 64)).float()
    codes[:, ::32] = 7
    dense = dequantize_4bit(quantize_4bit(codes * 0.5), code="int4", in_features=64, group_size=32)
    assert torch.equal(dense, codes * 0.5)


def test_fp4_uses_one_code_for_zero() -> None:
    tensors = quantize_4bit(torch.tensor([[6.0, 0.1, -0.1, 0.0]]), code="fp4")
    assert unpack_nibbles(tensors.qweight, 4).tolist() == [[7, 0, 0, 0]]


@pytest.mark.parametrize("code", sorted(CODES))
def test_levels_pack_to_what_they_stand_for(code: str) -> None:
    weight = torch.randn(6, 37)
    groups = split_groups(weight, 10)
    scale, zero = range_scales(groups)
    levels = nearest_levels(groups, scale, zero if code == "uint4" else None, code=code)
    zeros = zero.squeeze(2) if code == "uint4" else None
    tensors = from_levels(levels.flatten(1)[:, :37], scale.squeeze(2), zeros, code=code, group_size=10)
    want = (levels * scale).flatten(1)[:, :37]
    assert torch.equal(dequantize_4bit(tensors, code=code, in_features=37, group_size=10), want)


def test_important_weights_decide_the_scale() -> None:
    groups = torch.tensor([[[1.0, 0.1, 0.1, 0.1]]])
    candidates = [(torch.full((1, 1, 1), size), None) for size in (1 / 7, 0.1)]
    plain, _ = best_scales(groups, candidates, code="int4")
    weighted, _ = best_scales(groups, candidates, code="int4", importance=torch.tensor([1e-3, 1.0, 1.0, 1.0]))
    assert plain.item() == pytest.approx(1 / 7) and weighted.item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="best_scales needs at least one candidate, got none"):
        best_scales(groups, [], code="int4")


def test_half_and_bfloat16_weights() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weight = torch.randn(4, 40).to(dtype)
        assert torch.equal(quantize_4bit(weight).qweight, quantize_4bit(weight.float()).qweight)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(2, 2), {"code": "int5"}, "unknown 4-bit code 'int5': did you mean 'int4'"),
        (torch.ones(2), {}, "weight must be a non-empty floating-point matrix"),
        (torch.ones(2, 0), {}, "weight must be a non-empty floating-point matrix"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "weight must be a non-empty floating-point matrix"),
        (torch.ones(2, 2), {"group_size": 0}, "group_size must be at least 1, got 0"),
        (torch.tensor([[1.0, torch.nan]]), {}, "weight holds NaN or infinite values"),
        (torch.tensor([[1.0, 1e9]]), {}, "weights above 458528 are too large for float16 scales of int4"),
        (torch.full((1, 1), 7e4), {"code": "nf4"}, "weights above 65504 are too large for float16 scales of nf4"),
    ],
)
def test_errors(weight: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_4bit(weight, **options)  # type: ignore[arg-type]
