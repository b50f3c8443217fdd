"""A recipe carried out: `run`, and the single steps on saved models that the command line offers."""

from __future__ import annotations

from pykd.pipeline.baseline import baseline_saved
from pykd.pipeline.chain import run, run_chain
from pykd.pipeline.compare import compare_saved, safety_saved
from pykd.pipeline.exported import export_saved
from pykd.pipeline.result import Run
from pykd.pipeline.saved import evaluate_saved, prune_saved, quantize_saved
from pykd.pipeline.study import StudyRun, run_study
from pykd.pipeline.verified import verify, verify_saved

__all__ = [
    "Run",
    "StudyRun",
    "baseline_saved",
    "compare_saved",
    "evaluate_saved",
    "export_saved",
    "prune_saved",
    "quantize_saved",
    "run",
    "run_chain",
    "run_study",
    "safety_saved",
    "verify",
    "verify_saved",
]
