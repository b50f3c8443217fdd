"""Rows of a 4-bit weight: the lookup of an embedding, which unpacks the rows that are asked for and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, lib, skips_dispatcher
from pykd.ops.int4_r16 import code_number, dequantize, groups_of, packed_bytes, rows_r16

TABLE.append(Route("embedding_4bit", "all", "always", "rows gathered and dequantized by torch"))

lib.define(  # type: ignore[no-untyped-call]
    "embedding_4bit(Tensor ids, Tensor qweight, Tensor? scales, Tensor? zeros, str code, int num_embeddings, "
    "int embedding_dim, int group_size) -> Tensor"
)


def embedding_4bit(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor | None = None,
    *,
    embedding_dim: int,
    zeros: Tensor | None = None,
    code: str = "int4",
    num_embeddings: int | None = None,
    group_size: int = 32,
) -> Tensor:
    """Rows of a group-wise 4-bit weight (codes as in `pykd.linear_4bit`), exactly as the whole weight dequantizes.

    Args:
        ids: row numbers, int64 or int32 of any shape, from 0 to num_embeddings - 1.
        qweight: canonical codes, uint8 [num_embeddings, ceil(embedding_dim / 2)], with `scales`; or, without `scales`,
            the CPU layout `int4_r16`, for a weight that is also multiplied with.
        scales: float16 [num_embeddings, groups].
        embedding_dim: length of a row.
        zeros: for `uint4`: uint8 [num_embeddings, ceil(groups / 2)].
        num_embeddings: needed with the CPU layout only.

    Returns float32 [..., embedding_dim]. Raises ValueError for an unknown code, ids that are not whole numbers and
    shapes that do not fit, IndexError for a row that is not there (on the CPU; elsewhere as the device's gather does).

    >>> from pykd.nn.codecs.four_bit import quantize_4bit
    >>> w = quantize_4bit(torch.eye(4), group_size=4)
    >>> embedding_4bit(torch.tensor([2]), w.qweight, w.scales, embedding_dim=4, group_size=4) + 0.0
    tensor([[0., 0., 1., 0.]])
    """
    rows = qweight.shape[0] if num_embeddings is None else num_embeddings
    code_number(code)
    check_ids(ids)
    want: tuple[int, ...] = (rows, -(-embedding_dim // 2))
    if scales is None:
        wide = packed_bytes(rows, embedding_dim, group_size, code=code, wide_scales=True)
        want = (wide if qweight.numel() == wide else packed_bytes(rows, embedding_dim, group_size, code=code),)
    if qweight.shape != want:
        raise ValueError(
            f"{rows} rows of {embedding_dim} in {code} with group_size {group_size} need qweight {list(want)}, got "
            f"{list(qweight.shape)}"
        )
    groups = groups_of(embedding_dim, group_size).number
    if scales is not None and scales.shape != (rows, groups):
        raise ValueError(f"scales must be [{rows}, {groups}], one per group of a row, got {list(scales.shape)}")
    if scales is not None and (zeros is not None) != (code == "uint4"):
        raise ValueError("zeros go with code 'uint4' and with no other code")
    function = _lookup if skips_dispatcher(ids, None) else torch.ops.pykd.embedding_4bit
    result: Tensor = function(ids, qweight, scales, zeros, code, rows, embedding_dim, group_size)
    return result


def check_ids(ids: Tensor) -> None:
    """Raise ValueError unless these can be row numbers."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be row numbers, int64 or int32, got {ids.dtype} {list(ids.shape)}")


def check_range(ids: Tensor, rows: int) -> None:
    """Raise IndexError for a row number on the CPU that is out of range; other devices check as they gather."""
    if ids.is_cpu and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= rows:
            bad = int(low if low < 0 else high)
            raise IndexError(f"an embedding with {rows} rows has no row {bad}: ids go from 0 to {rows - 1}")


@torch.library.impl(lib, "embedding_4bit", "CompositeExplicitAutograd")
def _lookup(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    code: str,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
) -> Tensor:
    flat = ids.reshape(-1)
    check_range(flat, num_embeddings)
    if scales is None:
        sizes = {"out_features": num_embeddings, "in_features": embedding_dim, "group_size": group_size}
        parts = rows_r16(qweight, flat.long(), code=code, **sizes)
    else:
        parts = (
            F.embedding(flat, qweight),
            F.embedding(flat, scales),
            None if zeros is None else F.embedding(flat, zeros),
        )
    found = dequantize(*parts, code=code, in_features=embedding_dim, group_size=group_size)
    return found.view(*ids.shape, embedding_dim)


@torch.library.register_fake("pykd::embedding_4bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    code: str,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
) -> Tensor:
    return qweight.new_empty((*ids.shape, embedding_dim), dtype=torch.float32)
