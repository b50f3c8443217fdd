"""embedding_4bit: the rows of the dequantized weight bit for bit, from either layout, and its life as an operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pykd.nn.codecs.four_bit import FourBit, dequantize_4bit, quantize_4bit
from pykd.ops.embedding_4bit import embedding_4bit
from pykd.ops.int4_r16 import CODES, pack_r16


def make(rows: int, columns: int, code: str, group_size: int) -> tuple[FourBit, Tensor, Tensor]:
    """Canonical tensors, the CPU layout, and the dense weight."""
    tensors = quantize_4bit(torch.randn(rows, columns), code=code, group_size=group_size)
    packed = pack_r16(*tensors, in_features=columns, group_size=group_size)
    return tensors, packed, dequantize_4bit(tensors, code=code, in_features=columns, group_size=group_size)


@pytest.mark.parametrize("code", CODES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 90), group_size=st.integers(1, 100), seed=st.integers(0, 99))
def test_rows_are_those_of_the_dequantized_weight(
    code: str, rows: int, columns: int, group_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors, packed, dense = make(rows, columns, code, group_size)
    ids = torch.randint(rows, (2, 5))
    options = {"code": code, "embedding_dim": columns, "group_size": group_size}
    got = embedding_4bit(ids, tensors.qweight, tensors.scales, zeros=tensors.zeros, **options)  # type: ignore[arg-type]
    assert torch.equal(got, dense[ids])
    got = embedding_4bit(ids, packed, num_embeddings=rows, **options)  # type: ignore[arg-type]
    assert torch.equal(got, dense[ids])


def test_any_shape_and_integer_type_of_ids() -> None:
    tensors, packed, dense = make(40, 24, "nf4", 8)
    options = {"code": "nf4", "embedding_dim": 24, "group_size": 8}
    crossed = torch.arange(40).view(5, 8).t()
    for ids in (torch.tensor(39), torch.zeros(0, 3, dtype=torch.int64), torch.tensor([[1, 2]]).int(), crossed):
        for layout in ((tensors.qweight, tensors.scales), (packed, None)):
            got = embedding_4bit(ids, *layout, num_embeddings=40, **options)  # type: ignore[arg-type]
            assert torch.equal(got, dense[ids.long()])


@pytest.mark.parametrize("code", CODES)
def test_opcheck(code: str) -> None:
    tensors, packed, _ = make(33, 20, code, 8)
    ids = torch.tensor([[0, 32], [7, 7]])
    operator = torch.ops.pykd.embedding_4bit.default
    torch.library.opcheck(operator, (ids, *tensors, code, 33, 20, 8))
    torch.library.opcheck(operator, (ids, packed, None, None, code, 33, 20, 8))


def test_what_it_refuses() -> None:
    (qweight, scales, _), packed, _ = make(5, 16, "int4", 8)
    ids = torch.tensor([0])
    options = {"embedding_dim": 16, "group_size": 8}
    for bad, name in ((torch.tensor([0, 5]), "5"), (torch.tensor([-1]), "-1")):
        for layout in ((qweight, scales), (packed, None)):
            with pytest.raises(IndexError, match=f"an embedding with 5 rows has no row {name}: ids go from 0 to 4"):
                embedding_4bit(bad, *layout, num_embeddings=5, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ids must be row numbers, int64 or int32, got torch.float32 \[1\]"):
        embedding_4bit(torch.zeros(1), qweight, scales, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown 4-bit code 'int5': did you mean 'int4'"):
        embedding_4bit(ids, qweight, scales, code="int5", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"5 rows of 17 in int4 with group_size 8 need qweight \[5, 9\], got \[5, 8\]"):
        embedding_4bit(ids, qweight, scales, embedding_dim=17, group_size=8)
    with pytest.raises(ValueError, match=r"need qweight \[\d+\], got"):
        embedding_4bit(ids, packed, num_embeddings=50, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scales must be \[5, 2\], one per group of a row, got \[5, 1\]"):
        embedding_4bit(ids, qweight, scales[:, :1], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zeros go with code 'uint4' and with no other code"):
        embedding_4bit(ids, qweight, scales, code="uint4", **options)  # type: ignore[arg-type]
