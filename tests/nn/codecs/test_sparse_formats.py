"""Every format says the same mask, in the bytes that it promises, and refuses what it cannot have written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.nn.codecs import sparse_formats as formats
from pykd.nn.codecs.sparse_formats import choose_format, decode, encode, filled_mask, index_bytes, index_shapes
from pykd.ops.bitmask import pack_bits, unpack_bits

MaskOf = Callable[..., Tensor]


def round_trip(mask: Tensor, format: str) -> None:
    nnz = int(mask.sum())
    index = encode(mask, format)
    assert {name: (tuple(t.shape), t.dtype) for name, t in index.items()} == index_shapes(format, *mask.shape, nnz)
    assert sum(tensor.nbytes for tensor in index.values()) == index_bytes(format, *mask.shape, nnz)
    assert torch.equal(decode(index, format, *mask.shape, nnz), pack_bits(mask))


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from([*formats.FORMATS, "3x5", "3:4", "100:128"]),
    rows=st.integers(0, 70),
    columns=st.integers(0, 90),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_mask_comes_back(mask_of: MaskOf, format: str, rows: int, columns: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    mask = mask_of(format, rows, columns, density)
    assert choose_format(mask, format) == format
    round_trip(mask, format)
    chosen = choose_format(mask)
    round_trip(mask, chosen)
    if format in formats.FORMATS:
        nnz = int(mask.sum())
        assert index_bytes(chosen, rows, columns, nnz) <= index_bytes(format, rows, columns, nnz)


@pytest.mark.parametrize("format", ["csr16", "bitmask", "16x16", "1:16"])
def test_more_columns_than_16_bits_count(mask_of: MaskOf, format: str) -> None:
    mask = mask_of(format, 3, 140_000, 0.05)
    mask[1] = mask[1] & (format != "csr16")  # an empty row
    mask[0, 65535:65537] |= format in ("bitmask", "csr16")
    round_trip(mask, format)


def test_csr16_is_smaller_above_94_percent_and_chosen() -> None:
    for density, want in ((0.03, "csr16"), (0.1, "bitmask")):
        assert choose_format(torch.rand(256, 512) < density) == want


@pytest.mark.parametrize(
    ("name", "want"), [("4x1", "4x1"), ("16x16", "16x16"), ("2:4", "2:4"), ("1:4", "1:4"), ("block", "16x16")]
)
def test_structure_is_found(mask_of: MaskOf, name: str, want: str) -> None:
    mask = mask_of("16x16" if name == "block" else name, 128, 256)
    assert choose_format(mask, name) == want
    if name != "block":
        assert choose_format(mask) == want


def test_zeros_that_a_format_keeps() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0, 7.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    assert filled_mask(weight, "2:4").int().tolist() == [[1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0]]
    assert filled_mask(weight, "2x2").int().tolist() == [[1, 1, 0, 0, 1, 1, 0]] * 2
    assert torch.equal(filled_mask(weight, "bitmask"), weight != 0)
    assert torch.equal(filled_mask(weight, "1:4"), weight != 0)  # 7 and 8 do not fit


def test_errors() -> None:
    mask = torch.ones(4, 8).tril().bool()
    with pytest.raises(ValueError, match="unknown sparse format 'bitmaks': did you mean 'bitmask'"):
        choose_format(mask, "bitmaks")
    for pattern in ("4:4", "1:3", "1:512"):
        with pytest.raises(ValueError, match="M a power of two up to 256"):
            choose_format(mask, pattern)
    with pytest.raises(ValueError, match=r"mask \[4, 8\] does not fit format '4x1' \(blocks of 4 x 1 are kept"):
        choose_format(mask, "4x1")
    with pytest.raises(ValueError, match=r"format '2:4' \(2 of every 4 neighbours are kept\)"):
        choose_format(mask, "2:4")
    with pytest.raises(ValueError, match=r"format 'n:m' \(one of 1:2, 1:4"):
        choose_format(mask, "n:m")


@pytest.mark.parametrize(
    ("format", "columns", "damage", "message"),
    [
        ("csr16", 40, {"indices": [0, 0]}, "columns do not ascend within a row"),
        ("csr16", 40, {"indices": [3, 41]}, "or lie past the last one"),
        ("csr16", 40, {"counts": [1, 2]}, "do not add up to"),
        ("csr16", 40, {"counts": [-1, 3]}, "do not add up to"),
        ("4x1", 12, {"blocks": [0xFF, 0xFF]}, "a block past the last of 12 in a row is kept"),
        ("4x1", 16, {"blocks": [0xFF, 0xFF]}, "weights and there are"),
        ("2:4", 40, {"positions": [0]}, "places among neighbours do not ascend"),
        ("1:4", 41, {"positions": [0xFF] * 200}, "or lie past the last column"),
    ],
)
def test_damage_is_refused(
    mask_of: MaskOf, format: str, columns: int, damage: dict[str, list[int]], message: str
) -> None:
    mask = mask_of(format, 8, columns)
    if format == "csr16":
        mask = torch.zeros(2, columns, dtype=torch.bool)
        mask[0, 3:5] = True
    index = encode(mask, format)
    for name, first in damage.items():
        index[name] = index[name].clone()
        flat = index[name].view(-1)
        flat[: len(first)] = torch.tensor(first[: flat.numel()], dtype=flat.dtype)
    with pytest.raises(ValueError, match=f"corrupt {format} index: .*{message}"):
        decode(index, format, *mask.shape, int(mask.sum()))


def test_wrong_sizes_are_refused(mask_of: MaskOf) -> None:
    mask = mask_of("2:4", 4, 16)
    index = encode(mask, "2:4")
    with pytest.raises(ValueError, match=r"positions has shape \(8,\), not \(9,\)"):
        decode(index, "2:4", 4, 16, 36)
    with pytest.raises(ValueError, match=r"32 values are not those of \[4, 20\]"):
        decode(index, "2:4", 4, 20, 32)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["csr16", "4x1", "3x5", "1:4", "2:8", "bitmask"]),
    byte=st.integers(0, 10_000),
    bit=st.integers(0, 7),
    seed=st.integers(0, 9),
)
def test_a_flipped_bit_is_refused_or_another_valid_mask(
    mask_of: MaskOf, format: str, byte: int, bit: int, seed: int
) -> None:
    """Never a mask with another number of weights than there are values."""
    torch.manual_seed(seed)
    mask = mask_of(format, 12, 21)
    index, nnz = encode(mask, format), int(mask.sum())
    name = sorted(index)[byte % len(index)]
    raw = index[name].clone().view(torch.uint8).flatten()
    if raw.numel() == 0:
        return
    raw[byte % raw.numel()] ^= 1 << bit
    index[name] = raw.view(index[name].dtype).view(index[name].shape)
    try:
        bitmask = decode(index, format, 12, 21, nnz)
    except ValueError:
        return
    assert format == "bitmask" or int(unpack_bits(bitmask, 21).sum()) == nnz
