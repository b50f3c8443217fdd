"""int8_r16: the layout is what its description says, and gives back what it was made from."""

from __future__ import annotations

import pytest
import torch

from pykd.ops.int8_r16 import pack_r16, packed_bytes, unpack_r16


@pytest.mark.parametrize("shape", [(1, 1), (32, 4), (33, 67), (64, 128), (70, 5)], ids=str)
def test_packs_and_unpacks(shape: tuple[int, int]) -> None:
    codes, scales = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    packed = pack_r16(codes, scales)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(*shape),)
    again, again_scales = unpack_r16(packed, out_features=shape[0], in_features=shape[1])
    assert torch.equal(again, codes) and torch.equal(again_scales, scales)
    assert again.untyped_storage().nbytes() == codes.numel() and again_scales.untyped_storage().nbytes() == 4 * shape[0]


def test_every_byte_is_where_the_description_says() -> None:
    out, features = 37, 10
    codes, scales = torch.randint(-127, 128, (out, features), dtype=torch.int8), torch.rand(out)
    strips = pack_r16(codes, scales).view(2, -1)
    for row in range(out):
        strip = strips[row // 32]
        lane = row % 32
        assert strip[4 * lane : 4 * lane + 4].clone().view(torch.float32) == scales[row]
        start = strip[128 + 4 * lane : 132 + 4 * lane].clone().view(torch.int32)
        assert start == -128 * codes[row].long().sum()
        for k in range(12):
            line = 256 + (k // 4 * 2 + lane // 16) * 64
            want = codes[row, k] if k < features else 0
            assert strip[line + 4 * (lane % 16) + k % 4].view(torch.int8) == want


@pytest.mark.parametrize("features", [96, 768, 4096])
def test_adds_less_than_a_twentieth(features: int) -> None:
    assert packed_bytes(64, features) <= 1.05 * (64 * features + 64 * 4)
