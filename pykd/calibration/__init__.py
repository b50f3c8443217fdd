"""Calibration: examples run through a model, layer by layer, and what pruning and quantization learn of its inputs."""

from __future__ import annotations

from pykd.calibration.inputs import Inputs
from pykd.calibration.layers import Batch, Data, calibrate, calibration_batches

__all__ = ["Batch", "Data", "Inputs", "calibrate", "calibration_batches"]
