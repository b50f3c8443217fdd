"""What earlier versions saved loads today with the logits of then; tests/artifacts.py makes such folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pykd
from pykd.models.adapter import logits
from pykd.nn import COMPRESSED

ROOT = Path(__file__).parents[1] / "data_files" / "artifacts"
NAMES = sorted(folder.name for folder in ROOT.iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_with_the_logits_of_then(name: str) -> None:
    batch = load_file(ROOT / f"{name}.safetensors")
    expected = batch.pop("expected")
    model = pykd.from_pretrained(ROOT / name)
    with torch.no_grad():
        found = logits(model, batch)
    assert found.dtype == expected.dtype
    # Other processors add in another order; an activation between two codes may then be rounded to the other.
    rounds = any(getattr(module, "scheme", "") in ("w4a8", "w8a8", "w8a8_static") for module in model.modules())
    share = 2e-2 if rounds or expected.dtype != torch.float32 else 1e-5
    gap = (found.float() - expected.float()).abs().max()
    assert gap <= share * expected.float().abs().max(), f"{name}: {gap}"


def test_every_kind_of_layer_is_there_and_all_are_small() -> None:
    kinds = {type(module).__name__ for name in NAMES for module in pykd.from_pretrained(ROOT / name).modules()}
    assert set(COMPRESSED) <= kinds, "a new kind of layer needs a line in tests/artifacts.py"
    sizes = {name: sum(file.stat().st_size for file in (ROOT / name).iterdir()) for name in NAMES}
    assert max(sizes.values()) < 100_000 and sum(sizes.values()) < 2_000_000
