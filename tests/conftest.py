"""Shared set-up: Triton's interpreter where there is no GPU, a fixed seed, no reach to any model hub, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What this machine measured for its user must not decide what the tests compute, nor the reverse.
os.environ["PYKD_CACHE"] = tempfile.mkdtemp(prefix="pykd-tests-")

import pytest

# A job in the background of a shell starts with Ctrl-C ignored, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
