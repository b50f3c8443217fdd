"""The layouts of 4-bit weights: whatever is packed comes back exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.nn.codecs.four_bit import quantize_4bit
from pykd.ops.int4_r16 import CODES, groups_of, pack_nibbles, pack_r16, packed_bytes, unpack_nibbles, unpack_r16

sizes = st.integers(1, 90)


@given(rows=sizes, columns=sizes, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_nibbles_come_back(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, columns), codes)
    assert int(packed[0, 0] & 15) == int(codes[0, 0])  # even k in the low half


@given(out=sizes, features=st.integers(1, 200), group=st.integers(1, 220), code=st.sampled_from(sorted(CODES)))
@settings(max_examples=60, deadline=None)
def test_r16_gives_back_the_canonical_tensors(out: int, features: int, group: int, code: str) -> None:
    weight = torch.randn(out, features, generator=torch.Generator().manual_seed(out * features))
    tensors = quantize_4bit(weight, code=code, group_size=group)
    packed = pack_r16(*tensors, in_features=features, group_size=group)
    assert packed.shape == (packed_bytes(out, features, group, code=code),)
    back = unpack_r16(packed, out_features=out, in_features=features, group_size=group, code=code)
    for got, want in zip(back, tensors, strict=True):
        assert (got is None and want is None) or (got.dtype == want.dtype and torch.equal(got, want))


def test_r16_places_codes_as_documented() -> None:
    codes = torch.randint(0, 16, (32, 16), dtype=torch.uint8)
    scales = torch.rand(32, 1).half()
    packed = pack_r16(pack_nibbles(codes), scales, None, in_features=16, group_size=16)
    assert torch.equal(packed[:64].view(torch.float16), scales[:, 0])
    lines = packed[64:].view(2, 32, 4)  # eight k, row, byte
    assert torch.equal(lines & 15, codes.view(32, 2, 2, 4)[:, :, 0].transpose(0, 1))
    assert torch.equal(lines >> 4, codes.view(32, 2, 2, 4)[:, :, 1].transpose(0, 1))


def test_groups_of_rows_that_they_do_not_divide() -> None:
    assert groups_of(100, 32) == (32, 4, 32, 8)
    assert groups_of(100, 20) == (20, 5, 24, 24)
    assert groups_of(10, 128) == (10, 1, 16, 16)


def test_packing_adds_at_most_one_twentieth() -> None:
    for code, group in (("int4", 32), ("uint4", 32), ("nf4", 128)):
        tensors = quantize_4bit(torch.randn(96, 1024), code=code, group_size=group)
        stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        assert packed_bytes(96, 1024, group, code=code) <= 1.05 * stored
