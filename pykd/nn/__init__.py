"""nn: see docs/ARCHITECTURE.md."""

from __future__ import annotations

from pykd.nn.kd_loss import KDLoss

__all__ = ["KDLoss"]
