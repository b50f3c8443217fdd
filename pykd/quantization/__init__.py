"""Quantization: schemes that pack a layer, and the verb that applies them."""

from __future__ import annotations

from pykd.quantization.quantize import quantize
from pykd.quantization.schemes import SCHEMES

__all__ = ["SCHEMES", "quantize"]
