"""What a compressed model is worth: quality, size and speed, measured, compared and written down."""

from __future__ import annotations

from pykd.evaluation.comparison import Comparison, compare
from pykd.evaluation.latency import Interleaved, interleaved_latency
from pykd.evaluation.measure import evaluate, predict
from pykd.evaluation.report import Report

__all__ = ["Comparison", "Interleaved", "Report", "compare", "evaluate", "interleaved_latency", "predict"]
