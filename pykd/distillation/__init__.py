"""Distillation: losses that make a student follow its teacher, and the verb that trains with them."""

from __future__ import annotations

from pykd.distillation.distill import METHODS, distill
from pykd.distillation.logits import logits_loss

__all__ = ["METHODS", "distill", "logits_loss"]
