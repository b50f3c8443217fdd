"""nn: see docs/ARCHITECTURE.md."""

from __future__ import annotations

from pykd.nn.compressed import CompressedModule
from pykd.nn.kd_loss import KDLoss
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear

__all__ = ["COMPRESSED", "CompressedModule", "KDLoss", "SparseConv2d", "SparseLinear"]

#: `type` in the description of a saved layer -> the class that it is rebuilt with. One line per compressed layer.
COMPRESSED: dict[str, type[CompressedModule]] = {
    "SparseConv2d": SparseConv2d,
    "SparseLinear": SparseLinear,
}
