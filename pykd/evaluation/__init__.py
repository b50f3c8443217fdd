"""What a compressed model is worth: quality, size and speed, measured, compared and written down."""

from __future__ import annotations

from pykd.evaluation.comparison import Comparison, compare
from pykd.evaluation.latency import Interleaved, interleaved_latency
from pykd.evaluation.measure import evaluate, predict
from pykd.evaluation.report import Report
from pykd.evaluation.report_files import StageRecord, write_report

__all__ = [
    "Comparison",
    "Interleaved",
    "Report",
    "StageRecord",
    "compare",
    "evaluate",
    "interleaved_latency",
    "predict",
    "write_report",
]
