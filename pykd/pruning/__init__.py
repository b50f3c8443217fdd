"""Pruning: methods that find and remove what matters least, and the verb that applies them."""

from __future__ import annotations

from pykd.pruning.gradual import Gradual
from pykd.pruning.options import OPTIONS, check_prune, looks_at_data
from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.prune import METHODS, prune

__all__ = ["METHODS", "OPTIONS", "Gradual", "Outcome", "Request", "check_prune", "looks_at_data", "prune"]
