"""Scales in float16, bfloat16 and float32: what the CPU layout holds, and that products and rows are made from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.ops.embedding_4bit import embedding_4bit
from pykd.ops.int4_r16 import dequantize, pack_r16, packed_bytes, unpack_r16
from pykd.ops.linear_4bit import linear_4bit

SHAPES = [(45, 67, 16), (32, 64, 64), (1, 1, 32), (70, 130, 128)]


def tensors_of(out: int, features: int, group: int, code: str, scales: torch.Tensor | None = None) -> FourBit:
    tensors = quantize_4bit(torch.randn(out, features), code=code, group_size=group)
    return tensors if scales is None else tensors._replace(scales=scales)


@pytest.mark.parametrize("code", ["int4", "uint4", "nf4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_holds_any_scales_exactly(shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    groups = -(-features // group)
    fine, tiny = torch.rand(out, groups) / 3, torch.full((out, groups), 2.0**-40)
    for scales, wide in ((fine, True), (fine.bfloat16(), False), (tiny.bfloat16(), True), (fine.half().float(), False)):
        tensors = tensors_of(*shape, code, scales)
        packed = pack_r16(*tensors, in_features=features, group_size=group)
        assert packed.numel() == packed_bytes(out, features, group, code=code, wide_scales=wide)
        options: dict[str, Any] = {"out_features": out, "in_features": features, "group_size": group, "code": code}
        qweight, held, zeros = unpack_r16(packed, **options)
        assert held.dtype == (torch.float32 if wide else torch.float16)
        assert torch.equal(held.to(scales.dtype), scales) and torch.equal(qweight, tensors.qweight)
        assert zeros is None or torch.equal(zeros, tensors.zeros)


@pytest.mark.parametrize(
    ("code", "inputs"), [("int4", "keep"), ("uint4", "keep"), ("nf4", "keep"), ("int4", "int8"), ("uint4", "int8")]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_float32_scales(isa: str, shape: tuple[int, int, int], code: str, inputs: str) -> None:
    out, features, group = shape
    scales = torch.rand(out, -(-features // group)) * 1e-9  # below what float16 holds
    tensors = tensors_of(*shape, code, scales)
    packed = pack_r16(*tensors, in_features=features, group_size=group)
    options: dict[str, Any] = {"code": code, "group_size": group, "inputs": inputs}
    for rows in (1, 7, 40):
        x = torch.randn(rows, features)
        y = linear_4bit(x, packed, out_features=out, **options)
        want = linear_4bit(x, tensors.qweight, scales, zeros=tensors.zeros, **options)
        size = F.linear(x.abs(), dequantize(*tensors, code=code, in_features=features, group_size=group).abs())
        assert ((y - want).abs() <= 1e-6 * size).all()
        narrow = linear_4bit(x, tensors.qweight, scales.bfloat16(), zeros=tensors.zeros, **options)
        assert ((narrow - want).abs() <= 2.0**-7 * size).all()


@pytest.mark.parametrize("code", ["int4", "uint4"])
def test_rows_with_float32_scales(code: str) -> None:
    tensors = tensors_of(45, 67, 16, code, torch.rand(45, 5) / 3)
    packed = pack_r16(*tensors, in_features=67, group_size=16)
    dense, ids = dequantize(*tensors, code=code, in_features=67, group_size=16), torch.tensor([[0, 44], [33, 7]])
    options: dict[str, Any] = {"num_embeddings": 45, "embedding_dim": 67, "group_size": 16, "code": code}
    assert torch.equal(embedding_4bit(ids, packed, **options), dense[ids])


def test_other_scales_are_refused() -> None:
    tensors = tensors_of(4, 32, 32, "int4", torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="scales must be float16, bfloat16 or float32, got torch"):
        linear_4bit(torch.zeros(1, 32), tensors.qweight, tensors.scales)
