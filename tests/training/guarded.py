"""A guarded run whose learning rate is sabotaged; as a program, killed at every pass: `guarded.py DIR PASSES`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle, stack
from pykd.training import Guard, History, TrainConfig, fit, run

CONFIG = TrainConfig(
    epochs=4, batch_size=8, lr=2e-2, warmup_ratio=0, seed=3, checkpoint_steps=3, validate_steps=4, keep_checkpoints=2
)
BY_LOSS = Guard(metric="loss")
SANE = run.learning_rate


def sabotage(start: int, times: float = 1000.0, until: int = 10**9) -> None:
    """Multiply the learning rate of steps ``start`` .. ``until`` - 1 (from 0)."""

    def broken(step: int, total: int, **options: float) -> float:
        return SANE(step, total, **options) * (times if start <= step < until else 1.0)

    run.learning_rate = broken


def bundle() -> DataBundle:
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(3, 6, generator=generator) * 0.5
    items = [{"pixel_values": centers[i % 3] + torch.randn(6, generator=generator), "labels": i % 3} for i in range(48)]
    return DataBundle(items, items[:24], stack, ["a", "b", "c"], "blobs", fingerprint="blobs-48")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def accuracy(model: nn.Module) -> dict[str, Any]:
    """Accuracy on the held-out rows, the worst of them, and noise from the global generator that must do no harm."""
    torch.rand(1)
    data = bundle()
    batch = data.collate([data.test[i] for i in range(len(data.test))])
    training = model.training
    with torch.no_grad():
        scores = model.eval()(batch["pixel_values"])
    model.train(training)
    wrong = (scores.argmax(1) != batch["labels"]).nonzero()[:, 0].tolist()
    loss = nn.functional.cross_entropy(scores, batch["labels"]).item()
    return {"accuracy": 1 - len(wrong) / 24, "loss": loss, "wrong": wrong, "examples": [{"row": i} for i in wrong[:2]]}


def train(
    directory: Path | None, *, die_at: int = -1, guard: Guard | None = BY_LOSS, **options: Any
) -> tuple[str, History]:
    """(digest of the weights, history); the process dies in the middle of its pass ``die_at`` (from 0)."""
    model, done = network(), 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        nonlocal done
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]), {}

    options = {"progress": False, "validate": accuracy} | options
    history = fit(model, bundle(), loss_fn, CONFIG, guard=guard, checkpoint_dir=directory, **options)
    return digest(model), history


def end(directory: Path, die_at: int, *, resume: bool) -> list[Any]:
    """What a process of its own says of its end; its status alone when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        found, history = train(directory, die_at=die_at, resume=resume)
        decided = [[entry["step"], entry["action"], entry.get("newly_wrong")] for entry in history.validations]
        os.write(writing, json.dumps([found, history.steps, history.outcome, decided]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else [status]


if __name__ == "__main__":
    torch.set_num_threads(1)  # and so no thread to lose in a fork
    train(Path(sys.argv[1]) / "first")  # imports what torch imports late, once for all
    sabotage(10)
    for die_at in range(int(sys.argv[2])):
        folder = Path(sys.argv[1]) / str(die_at)
        killed = end(folder, die_at, resume=False)
        states = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
        print(json.dumps({"killed": killed, "states": len(states), "resumed": end(folder, -1, resume=True)}))
