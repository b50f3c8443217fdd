"""What a compressed model is worth: quality, size and speed, measured, compared and written down."""

from __future__ import annotations

from pykd.evaluation.comparison import Comparison, compare
from pykd.evaluation.explanations import Explanations, explanation_similarity
from pykd.evaluation.latency import Interleaved, interleaved_latency
from pykd.evaluation.measure import evaluate, predict
from pykd.evaluation.report import Report
from pykd.evaluation.report_files import StageRecord, write_report

__all__ = [
    "Comparison",
    "Explanations",
    "Interleaved",
    "Report",
    "StageRecord",
    "compare",
    "evaluate",
    "explanation_similarity",
    "interleaved_latency",
    "predict",
    "write_report",
]
