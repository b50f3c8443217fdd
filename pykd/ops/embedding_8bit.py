"""Rows of an int8 weight: the lookup of an embedding, which unpacks the rows that are asked for and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, lib, skips_dispatcher
from pykd.ops.embedding_4bit import check_ids, check_range
from pykd.ops.int8_r16 import packed_bytes, rows_r16

TABLE.append(Route("embedding_8bit", "all", "always", "rows gathered and dequantized by torch"))

lib.define(  # type: ignore[no-untyped-call]
    "embedding_8bit(Tensor ids, Tensor qweight, Tensor? scales, int num_embeddings, int embedding_dim) -> Tensor"
)


def embedding_8bit(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor | None = None,
    *,
    embedding_dim: int,
    num_embeddings: int | None = None,
) -> Tensor:
    """Rows of an int8 weight with a scale per row, q * scale, exactly as the whole weight dequantizes.

    Args:
        ids: row numbers, int64 or int32 of any shape, from 0 to num_embeddings - 1.
        qweight: int8 [num_embeddings, embedding_dim], with `scales`; or, without `scales`, the CPU layout `int8_r16`,
            for a weight that is also multiplied with.
        scales: float32 [num_embeddings].
        embedding_dim: length of a row.
        num_embeddings: needed with the CPU layout only.

    Returns float32 [..., embedding_dim]. Raises ValueError for ids that are not whole numbers and shapes that do not
    fit, IndexError for a row that is not there (on the CPU; elsewhere as the device's gather does).

    >>> from pykd.nn.codecs.eight_bit import quantize_8bit
    >>> embedding_8bit(torch.tensor([1]), *quantize_8bit(torch.eye(2)), embedding_dim=2)
    tensor([[0., 1.]])
    """
    rows = qweight.shape[0] if num_embeddings is None else num_embeddings
    check_ids(ids)
    want = (packed_bytes(rows, embedding_dim),) if scales is None else (rows, embedding_dim)
    if qweight.shape != want or (scales is not None and scales.shape != (rows,)):
        raise ValueError(
            f"{rows} rows of {embedding_dim} need qweight {list(want)} and, with a canonical weight, scales [{rows}], "
            f"got {list(qweight.shape)} and {None if scales is None else list(scales.shape)}"
        )
    function = _lookup if skips_dispatcher(ids, None) else torch.ops.pykd.embedding_8bit
    result: Tensor = function(ids, qweight, scales, rows, embedding_dim)
    return result


@torch.library.impl(lib, "embedding_8bit", "CompositeExplicitAutograd")
def _lookup(ids: Tensor, qweight: Tensor, scales: Tensor | None, num_embeddings: int, embedding_dim: int) -> Tensor:
    flat = ids.reshape(-1)
    check_range(flat, num_embeddings)
    if scales is None:
        codes, row_scales = rows_r16(qweight, flat.long(), in_features=embedding_dim)
    else:
        codes, row_scales = F.embedding(flat, qweight), scales[flat.long()]
    return (codes.float() * row_scales[:, None]).view(*ids.shape, embedding_dim)


@torch.library.register_fake("pykd::embedding_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(ids: Tensor, qweight: Tensor, scales: Tensor | None, num_embeddings: int, embedding_dim: int) -> Tensor:
    return qweight.new_empty((*ids.shape, embedding_dim), dtype=torch.float32)
