"""Masks that fit a sparse format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pykd.nn.codecs import sparse_formats as formats


@pytest.fixture(scope="session")
def mask_of() -> Callable[..., Tensor]:
    """mask_of(format, rows, columns, density=0.4): a random mask, bool [rows, columns], that the format fits."""
    return _mask_of


def _mask_of(format: str, rows: int, columns: int, density: float = 0.4) -> Tensor:
    kind = formats._parse(format)
    if isinstance(kind, formats._Block):
        blocks = torch.rand(-(-rows // kind.rows), -(-columns // kind.columns)) < density
        return formats._spread(blocks, kind)[:rows, :columns].contiguous()
    mask = torch.rand(rows, columns) < density
    if isinstance(kind, formats._Pattern):
        for start in range(0, columns, kind.of):
            group = mask[:, start : start + kind.of]
            order = torch.rand(group.shape).argsort(1)
            group.zero_().scatter_(1, order[:, : kind.kept], True)
    return mask
