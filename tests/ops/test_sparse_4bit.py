"""One row through a pruned 4-bit weight: the sums of the dense layer, from the kept codes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pykd.nn import Linear4bit
from pykd.ops.dispatch import native, vector_level
from pykd.ops.int4_r16 import unpack_nibbles
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.sparse_4bit import GAINS_UP_TO, fits, pack_kept, sparse_4bit

pytestmark = pytest.mark.skipif(native is None, reason="only the native kernel reads kept codes")


def layer(columns: int, out: int, density: float, scheme: str = "w4a16", group_size: int | None = 32) -> Linear4bit:
    linear = nn.Linear(columns, out)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(out, columns) < density)
    return Linear4bit.from_linear(linear, scheme=scheme, group_size=group_size).requires_grad_(False)


@pytest.mark.parametrize(
    ("scheme", "dtype", "columns", "group_size"),
    [
        ("w4a16", torch.float32, 1, 32),
        ("w4a16", torch.bfloat16, 200, 64),
        ("nf4", torch.float16, 1100, 32),
        ("fp4", torch.float32, 45, None),
    ],
    ids=str,
)
def test_sums_of_the_dense_layer(
    isa: str, scheme: str, dtype: torch.dtype, columns: int, group_size: int | None
) -> None:
    for density in (0.0, 0.3, 1.0):
        dense = layer(columns, 37, density, scheme, group_size)
        tensors = dense._tensors()
        made = pack_kept(unpack_nibbles(tensors.qweight, columns), dense._kept(tensors))
        x = torch.randn(1, columns).to(dtype)
        options = {"code": dense.code, "group_size": dense.group_size, "bias": dense.bias, "activation": "gelu"}
        got = sparse_4bit(x, **made, scales=tensors.scales, **options)
        want = linear_4bit(x.float(), *tensors[:2], **options)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    dense = layer(520, 700, 0.3)
    tensors = dense._tensors()
    made = pack_kept(unpack_nibbles(tensors.qweight, 520), dense._kept(tensors))
    x, before, results = torch.randn(520), torch.get_num_threads(), []
    try:
        for threads in (2, 1, 3, 5):
            torch.set_num_threads(threads)
            results.append(sparse_4bit(x, **made, scales=tensors.scales, code="int4", group_size=32))
    finally:
        torch.set_num_threads(before)
    assert results[0].shape == (700,) and all(torch.equal(results[0], other) for other in results[1:])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 130), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_packing_keeps_every_code(rows: int, columns: int, density: float, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    mask = torch.rand(rows, columns) < density
    made = pack_kept(codes, mask)
    found, nibbles = [], unpack_nibbles(made["kept"], 2 * made["kept"].numel()).tolist()
    for row in range(rows):
        at = 2 * int(made["starts"][row])
        for block in range(0, columns, 32):
            count = int(mask[row, block : block + 32].sum())
            found += nibbles[at : at + count]
            at += count + count % 2
    assert found == codes[mask].tolist()


def test_a_layer_goes_there_for_one_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykd.nn.linear_4bit.fits", lambda *_: True)
    sparse = layer(96, 40, 0.5)
    assert set(dict(sparse.named_buffers())) == {"packed", "bits", "kept", "starts", "scales"}
    assert set(sparse.state_dict()) == {"bitmask", "qvalues", "scales", "bias"}
    called: list[int] = []
    monkeypatch.setattr(
        "pykd.nn.linear_4bit.sparse_4bit", lambda x, *a, **k: called.append(x.numel()) or sparse_4bit(x, *a, **k)
    )
    dense = sparse.to_linear()
    for other in (sparse, copy.deepcopy(sparse)):
        for x in (torch.randn(1, 96), torch.randn(96), torch.randn(2, 96)):
            torch.testing.assert_close(other(x), dense(x), rtol=1e-4, atol=1e-4)
    assert called == [96] * 4
    x = torch.randn(1, 96, requires_grad=True)
    sparse(x).sum().backward()
    assert x.grad is not None and called == [96] * 4


def test_where_it_fits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fits(0.01, "int4", 256, 32)  # no level gains
    monkeypatch.setitem(GAINS_UP_TO, vector_level(), 0.55)
    assert fits(0.01, "int4", 256, 32) and fits(0.5, "nf4", 100, 100)
    assert not fits(0.9, "int4", 256, 32) and not fits(0.01, "uint4", 256, 32) and not fits(0.01, "int4", 256, 48)
    monkeypatch.setattr("pykd.ops.sparse_4bit.native", None)
    assert not fits(0.01, "int4", 256, 32)


def test_errors() -> None:
    made = pack_kept(torch.full((3, 40), 9, dtype=torch.uint8), torch.rand(3, 40) < 0.5)
    for shape in ((2, 40), (1, 70)):
        with pytest.raises(ValueError, match="sparse_4bit takes one row of inputs for a bitmask of 64 columns"):
            sparse_4bit(torch.randn(shape), **made, scales=torch.ones(3, 2).half(), code="int4", group_size=32)
