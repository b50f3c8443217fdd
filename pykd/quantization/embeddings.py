"""Embeddings: rows that are looked up, each weight once, whoever else computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pykd.errors import nearest
from pykd.nn import Embedding4bit, Embedding8bit, Embedding16bit, TiedEmbedding, TiedLinear
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT
from pykd.nn.linear_4bit import ROUNDING_4BIT, SCHEMES_4BIT, code_of, is_4bit
from pykd.nn.selection import replace_layer, sharing
from pykd.nn.tied import Tied
from pykd.ops.int4_r16 import CODEBOOK

#: Schemes of embeddings: there is no activation to round.
EMBEDDING_SCHEMES: tuple[str, ...] = (
    *(name for name in SCHEMES_4BIT if name not in ROUNDING_4BIT),
    "w8a16",
    *SCHEMES_16BIT,
)


def check_embeddings(scheme: object) -> None:
    """Raise ValueError for a scheme that embeddings cannot be stored in; None leaves them alone.

    >>> check_embeddings("w8a16")
    """
    if scheme is None or scheme in EMBEDDING_SCHEMES:
        return
    if not isinstance(scheme, str) or not scheme.startswith(CODEBOOK):
        raise ValueError(nearest("scheme for embeddings", scheme, (*EMBEDDING_SCHEMES, CODEBOOK)))
    code_of(scheme)


def packed_embedding(
    layer: nn.Embedding, scheme: str, *, group_size: int | None, symmetric: bool
) -> Embedding4bit | Embedding8bit | Embedding16bit:
    """The packed form of an embedding, by plain rounding."""
    if scheme in SCHEMES_16BIT:
        return Embedding16bit.from_embedding(layer, scheme=scheme)
    if not is_4bit(scheme):
        return Embedding8bit.from_embedding(layer)
    return Embedding4bit.from_embedding(layer, scheme=scheme, group_size=group_size, symmetric=symmetric)


@torch.no_grad()
def quantize_embeddings(
    model: nn.Module,
    names: Sequence[str],
    scheme: str,
    *,
    group_size: int | None,
    symmetric: bool,
    least_saving_bytes: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Replace these embeddings, and what shares their weights by layers tied to them; as `_quantize_layers`."""
    changed: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, Tied):  # shared its weight with one that came before
            continue
        assert isinstance(layer, nn.Embedding)
        partners = sharing(model, name)
        packed = packed_embedding(layer, scheme, group_size=group_size, symmetric=symmetric)
        before, after = (sum(t.nbytes for t in module.state_dict().values()) for module in (layer, packed))
        if before - after < least_saving_bytes:
            skipped[name] = f"would be stored in {after} instead of {before} bytes: no gain"
            continue
        replace_layer(model, layer, packed)
        changed[name] = {"type": type(packed).__name__, "bytes_before": before, "bytes_after": after}
        for other, partner in partners.items():
            assert isinstance(partner, (nn.Linear, nn.Embedding))
            make: Any = TiedLinear.from_linear if isinstance(partner, nn.Linear) else TiedEmbedding.from_embedding
            tied = make(partner, packed)
            replace_layer(model, partner, tied)
            changed[other] = {"type": type(tied).__name__, "tied_to": name}
    return changed, skipped
