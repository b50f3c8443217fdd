"""A small training run, with dropout, in a process of its own: `killed.py DIR STEPS_BEFORE_DEATH RESUME [METHOD]`.

METHOD: prune gradually by it meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, stack
from pykd.pruning import Gradual
from pykd.training import TrainConfig, fit

CONFIG = TrainConfig(epochs=3, batch_size=8, lr=1e-2, seed=3, checkpoint_steps=2)


def bundle() -> DataBundle:
    generator = torch.Generator().manual_seed(1)
    items = [
        {"pixel_values": torch.randn(6, generator=generator), "labels": int(torch.randint(3, (), generator=generator))}
        for _ in range(29)
    ]
    return DataBundle(items, items[:4], stack, ["a", "b", "c"], "noise", fingerprint="noise-29")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def train(
    directory: Path | None, *, die_at: int = -1, resume: bool = False, how: int = signal.SIGKILL, method: str = ""
) -> str:
    """Digest of the trained weights; the process gets the signal ``how`` in the middle of step ``die_at`` (from 0)."""
    model = network()
    done = 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal done
        if done == die_at:
            os.kill(os.getpid(), how)
        done += 1
        return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]), {}

    prune = Gradual(method, sparsity=0.6, every=2, scope="layer", include=["0", "4"]) if method else None
    fit(model, bundle(), loss_fn, CONFIG, checkpoint_dir=directory, resume=resume, progress=False, prune=prune)
    return digest(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        train(Path(sys.argv[1]), die_at=int(sys.argv[2]), resume=sys.argv[3] == "resume", method="".join(sys.argv[4:]))
    )
