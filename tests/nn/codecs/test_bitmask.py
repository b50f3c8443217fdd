from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.nn.codecs.bitmask import pack, packed_bytes, unpack


@given(rows=st.integers(0, 8), columns=st.integers(0, 30), seed=st.integers(0, 2**31), masked=st.booleans())
@settings(max_examples=50, deadline=None)
def test_round_trip(rows: int, columns: int, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).float()
    mask = torch.rand(rows, columns, generator=generator) < 0.5 if masked else None
    packed = pack(weight, mask)
    kept = weight != 0 if mask is None else mask
    assert torch.equal(unpack(packed), torch.where(kept, weight, 0.0))
    stored = packed.bitmask.numel() + packed.values.numel() * 4
    assert stored == packed_bytes((rows, columns), packed.values.numel(), 4)


def test_exactly_what_the_mask_says_is_kept() -> None:
    weight = torch.tensor([[0.0, -0.0, float("nan"), 5.0, float("-inf")]])
    default = pack(weight)
    assert default.values.isnan().tolist() == [True, False, False]
    assert default.values[1:].tolist() == [5.0, float("-inf")]
    mask = torch.tensor([[True, True, False, True, False]])
    packed = pack(weight, mask)
    assert packed.values.tolist() == [0.0, -0.0, 5.0]
    assert torch.signbit(packed.values).tolist() == [False, True, False]
    assert unpack(packed)[~mask].tolist() == [0.0, 0.0]
    assert packed.density == pytest.approx(0.6)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"matrix \[out, in\]; got shape \(3,\)"):
        pack(torch.ones(3))
    with pytest.raises(ValueError, match="mask has to be boolean"):
        pack(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got torch.bool of shape \(3, 2\)"):
        pack(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool))
    packed = pack(torch.ones(2, 3))
    with pytest.raises(ValueError, match="keeps 6 elements but"):
        unpack(packed._replace(values=packed.values[:5]))
