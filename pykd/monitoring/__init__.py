"""What a model in use is watched by: drift against a stored baseline, quality from true labels, a log that rotates."""

from __future__ import annotations

from pykd.monitoring.baseline import Baseline, quantities
from pykd.monitoring.drift import Drift, Thresholds, kolmogorov_smirnov, stability_index
from pykd.monitoring.log import RotatingLog, read_log
from pykd.monitoring.measure import HeadInputs, measure_baseline
from pykd.monitoring.watch import ModelWatch, Prediction

__all__ = [
    "Baseline",
    "Drift",
    "HeadInputs",
    "ModelWatch",
    "Prediction",
    "RotatingLog",
    "Thresholds",
    "kolmogorov_smirnov",
    "measure_baseline",
    "quantities",
    "read_log",
    "stability_index",
]
