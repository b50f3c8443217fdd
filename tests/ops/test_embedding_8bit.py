"""embedding_8bit: the rows of the dequantized weight bit for bit, from either layout, and its life as an operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.nn.codecs.eight_bit import dequantize_8bit, quantize_8bit
from pykd.ops.embedding_8bit import embedding_8bit
from pykd.ops.int8_r16 import pack_r16


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_rows_are_those_of_the_dequantized_weight(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = quantize_8bit(torch.randn(rows, columns))
    dense, ids = dequantize_8bit(tensors), torch.randint(rows, (3, 2))
    assert torch.equal(embedding_8bit(ids, *tensors, embedding_dim=columns), dense[ids])
    packed = pack_r16(*tensors)
    assert torch.equal(embedding_8bit(ids, packed, embedding_dim=columns, num_embeddings=rows), dense[ids])
    empty = torch.zeros(0, 2, dtype=torch.int32)
    assert embedding_8bit(empty, packed, embedding_dim=columns, num_embeddings=rows).shape == (0, 2, columns)


def test_opcheck() -> None:
    tensors = quantize_8bit(torch.randn(33, 20))
    ids = torch.tensor([[0, 32], [7, 7]])
    torch.library.opcheck(torch.ops.pykd.embedding_8bit.default, (ids, *tensors, 33, 20))
    torch.library.opcheck(torch.ops.pykd.embedding_8bit.default, (ids, pack_r16(*tensors), None, 33, 20))


def test_what_it_refuses() -> None:
    tensors = quantize_8bit(torch.randn(5, 16))
    for layout, rows in ((tensors, None), ((pack_r16(*tensors), None), 5)):
        with pytest.raises(IndexError, match="an embedding with 5 rows has no row 5: ids go from 0 to 4"):
            embedding_8bit(torch.tensor([5]), *layout, embedding_dim=16, num_embeddings=rows)
    with pytest.raises(ValueError, match=r"ids must be row numbers, int64 or int32, got torch\.bool"):
        embedding_8bit(torch.tensor([True]), *tensors, embedding_dim=16)
    with pytest.raises(ValueError, match=r"5 rows of 15 need qweight \[5, 15\] .* got \[5, 16\] and \[5\]"):
        embedding_8bit(torch.tensor([0]), *tensors, embedding_dim=15)
