"""Random state: a function of the step, and left as it was found when training ends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Seed Python, NumPy and every torch device from (seed, step, rank) alone: no step depends on the one before."""
    mixed = int(np.random.SeedSequence([seed % 2**64, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed % 2**63)


def get_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random state of Python, NumPy, torch and every CUDA device: tensors, and the rest as JSON-able values."""
    version, internal, gauss = random.getstate()
    legacy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"pos": int(legacy["state"]["pos"]), "has_gauss": legacy["has_gauss"], "gauss": legacy["gauss"]},
    }
    return tensors, plain


def set_rng(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what :func:`get_rng` returned. CUDA devices that are absent now are passed over."""
    random.setstate((plain["python"]["version"], tuple(tensors["python"].tolist()), plain["python"]["gauss"]))
    numpy = plain["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(tensors["torch"])
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave every generator as it was found, whatever happens inside."""
    saved = get_rng()
    try:
        yield
    finally:
        set_rng(*saved)
