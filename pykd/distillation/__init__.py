"""Distillation: losses that make a student follow its teacher, and the verb that trains with them."""

from __future__ import annotations

from pykd.distillation.cache import cache_teacher
from pykd.distillation.chain import Chain, distill_chain
from pykd.distillation.distill import distill
from pykd.distillation.logits import logits_loss
from pykd.distillation.methods import METHODS, Method
from pykd.distillation.teacher_cache import TeacherCache

__all__ = ["METHODS", "Chain", "Method", "TeacherCache", "cache_teacher", "distill", "distill_chain", "logits_loss"]
