"""Pruning: methods that find and remove what matters least, and the verb that applies them."""

from __future__ import annotations

from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.prune import METHODS, prune

__all__ = ["METHODS", "Outcome", "Request", "prune"]
