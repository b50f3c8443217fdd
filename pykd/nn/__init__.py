"""nn: see docs/ARCHITECTURE.md."""

from __future__ import annotations

from pykd.nn.compressed import CompressedModule
from pykd.nn.kd_loss import KDLoss

__all__ = ["COMPRESSED", "CompressedModule", "KDLoss"]

#: `type` in the description of a saved layer -> the class that it is rebuilt with. One line per compressed layer.
COMPRESSED: dict[str, type[CompressedModule]] = {}
