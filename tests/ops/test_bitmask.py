from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pykd.ops.bitmask import (
    PackedSparse,
    bitmask_expand,
    bitmask_expand_reference,
    bitmask_gather,
    bitmask_gather_reference,
    bitmask_offsets,
    check_packed,
    pack_bits,
    unpack_bits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def random_packed(out: int, columns: int, density: float, dtype: torch.dtype = torch.float32) -> PackedSparse:
    mask = torch.rand(out, columns) < density
    return PackedSparse(pack_bits(mask), (torch.randn(int(mask.sum())) * 8).to(dtype), columns)


@given(rows=st.integers(0, 9), columns=st.integers(0, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_pack_and_unpack_are_inverse(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (rows, (columns + 7) // 8) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, columns), mask)
    offsets = bitmask_offsets(bits, columns)
    assert torch.equal(offsets[1:] - offsets[:-1], mask.sum(1))


def test_least_significant_bit_is_the_first_column() -> None:
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [[0b1001, 0b10]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (300, 257), (0, 4), (4, 0)], ids=str)
def test_expand_and_gather_equal_the_reference(
    isa: str, shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    packed = random_packed(*shape, density, dtype)
    dense = bitmask_expand(packed)
    assert torch.equal(dense, bitmask_expand_reference(packed.values, packed.bitmask, packed.in_features))
    back = bitmask_gather(dense, packed.bitmask, packed.values.numel())
    assert torch.equal(back, packed.values)
    other = (torch.randn(shape) * 8).to(dtype)
    got = bitmask_gather(other, packed.bitmask, packed.values.numel())
    assert torch.equal(got, bitmask_gather_reference(other, packed.bitmask))


def test_special_values_and_strided_input_survive(isa: str) -> None:
    values = torch.tensor([float("nan"), -0.0, float("inf"), 0.0, 1e-42, -3.0])
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    strided = torch.stack([values, -values], 1)[:, 0]
    packed = PackedSparse(pack_bits(mask), strided, 4)
    dense = bitmask_expand(packed)
    assert torch.equal(dense[mask].view(torch.int32), values.view(torch.int32))
    assert torch.equal(dense[~mask].view(torch.int32), torch.zeros(2, dtype=torch.int32))
    back = bitmask_gather(dense.t().contiguous().t(), packed.bitmask, 6)
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


def test_gradients(isa: str) -> None:
    packed = random_packed(5, 13, 0.4)
    values = packed.values.requires_grad_()
    upstream = torch.randn(5, 13)
    bitmask_expand(packed).backward(upstream)
    assert values.grad is not None
    assert torch.equal(values.grad, upstream[unpack_bits(packed.bitmask, 13)])
    double = values.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: bitmask_expand(PackedSparse(packed.bitmask, v, 13)), double)
    dense = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: bitmask_gather(d, packed.bitmask, values.numel()), dense)


def test_opcheck() -> None:
    packed = random_packed(5, 13, 0.4)
    for values in (packed.values, packed.values.clone().requires_grad_()):
        opcheck(torch.ops.pykd.bitmask_expand, (values, packed.bitmask, 13))
    for dense in (torch.randn(5, 13), torch.randn(5, 13, requires_grad=True)):
        opcheck(torch.ops.pykd.bitmask_gather, (dense, packed.bitmask, packed.values.numel()))


def test_compiles_in_one_graph() -> None:
    packed = random_packed(6, 20, 0.5)
    compiled = torch.compile(lambda p: bitmask_expand(p) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), bitmask_expand(packed) * 2)


@pytest.mark.parametrize("path", ["native", "reference"])
def test_corruption_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "reference":
        monkeypatch.setattr("pykd.ops.bitmask.native", None)
    packed = random_packed(4, 11, 0.5)
    tail = packed.bitmask.clone()
    tail[2, 1] |= 0b1000
    with pytest.raises(ValueError, match="row 2 has bits set past its last column"):
        check_packed(packed._replace(bitmask=tail))
    flipped = packed.bitmask.clone()
    flipped[1, 0] ^= 1
    with pytest.raises(ValueError, match=r"bitmask keeps \d+ elements but `values` has shape"):
        bitmask_expand(packed._replace(bitmask=flipped))
    with pytest.raises(ValueError, match=r"uint8 \[out, 3\]"):
        check_packed(packed._replace(in_features=17))
    with pytest.raises(ValueError, match=r"`values` has shape \(1, "):
        check_packed(packed._replace(values=packed.values[None]))
    with pytest.raises(ValueError, match=r"`values` is on meta"):
        check_packed(packed._replace(values=packed.values.to("meta")))
    with pytest.raises(ValueError, match="elements, not nnz=3"):
        bitmask_gather(torch.randn(4, 11), packed.bitmask, 3)
    with pytest.raises(ValueError, match="matrix with the bitmask's 4 rows"):
        bitmask_gather(torch.randn(5, 11), packed.bitmask, 3)
    with pytest.raises(ValueError, match="packs a boolean matrix"):
        pack_bits(torch.ones(2, 2))
