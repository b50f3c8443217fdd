"""Shared set-up: Triton's interpreter where there is no GPU, a fixed seed, and no reach to any model hub."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
