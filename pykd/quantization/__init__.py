"""Quantization: schemes that pack a layer, methods that choose its codes, and the verb that applies them."""

from __future__ import annotations

from pykd.calibration.inputs import Inputs
from pykd.quantization.embeddings import EMBEDDING_SCHEMES, check_embeddings
from pykd.quantization.methods import METHODS, check_method
from pykd.quantization.observers import OBSERVERS, check_observer
from pykd.quantization.qat import QAT_SCHEMES, check_qat, convert_qat, prepare_qat
from pykd.quantization.quantize import quantize
from pykd.quantization.schemes import SCHEMES
from pykd.quantization.sensitivity import Assignment, assign_bits, check_candidates

__all__ = [
    "EMBEDDING_SCHEMES",
    "METHODS",
    "OBSERVERS",
    "QAT_SCHEMES",
    "SCHEMES",
    "Assignment",
    "Inputs",
    "assign_bits",
    "check_candidates",
    "check_embeddings",
    "check_method",
    "check_observer",
    "check_qat",
    "convert_qat",
    "prepare_qat",
    "quantize",
]
