"""One process of a run, alone or of several: `launched.py RANK PROCESSES PORT KIND RESULT [FOLDER STOP RESUME]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CONFIG = {"batch_size": 4, "lr": 1e-2, "epochs": 3, "clip_norm": 0.5}


def bundle() -> Any:
    """22 rows of which unequal shares of the positions count."""
    import torch

    from pykd.data.bundle import DataBundle, stack

    generator = torch.Generator().manual_seed(1)
    items = []
    for row in range(22):
        labels = torch.randint(5, (7,), generator=generator)
        labels[1 + row % 6 :] = -100
        items.append({"x": torch.randn(7, 6, generator=generator), "labels": labels})
    return DataBundle(items, items[:8], stack, list("abcde"), "positions", fingerprint="positions-22")


def train(
    batch_size: int, checkpoints: Path | None = None, *, resume: bool = False, steps: int = 100, projected: bool = True
) -> Any:
    """(losses, hidden losses, validations, weights) of a distillation, with a projection or not; dropout 0."""
    import torch
    from torch import nn

    import pykd
    from pykd.training import Guard, TrainConfig, fit

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    projection = nn.Linear(5, 3) if projected else nn.Identity()
    data, done = bundle(), 0

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Any:
        nonlocal done
        if done == steps:
            os._exit(7)
        done += 1
        scores = model(batch["x"])
        counted = (batch["labels"] != -100)[..., None]
        hidden = ((projection(scores)[..., :3] - 1).square() * counted).sum() / (3 * counted.sum())
        return pykd.kd_loss(scores, batch["x"][..., :5] * 3, batch["labels"]) + hidden, {"hidden": hidden}

    def validate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            batch = data.collate([data.test[index] for index in range(8)])
            return {"loss": float(pykd.kd_loss(model(batch["x"]), batch["x"][..., :5] * 3, batch["labels"]))}

    history = fit(
        model, data, loss_fn, TrainConfig(**CONFIG | {"batch_size": batch_size, "checkpoint_steps": 2}),
        modules={"projection": projection} if projected else None, validate=validate, guard=Guard(drop=1.0),
        progress=False, checkpoint_dir=checkpoints, resume=resume,
    )  # fmt: skip
    weights = {f"model.{name}": value.tolist() for name, value in model.state_dict().items()}
    weights |= {f"projection.{name}": value.tolist() for name, value in projection.state_dict().items()}
    losses = [record["loss"] for record in history.records], [record["hidden"] for record in history.records]
    return *losses, [entry["value"] for entry in history.validations], weights


#: What `accelerate launch` tells its processes of each kind.
KINDS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    },
    "zero2": {
        "ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    },
}  # fmt: skip


def main(rank: int, processes: int, port: str, kind: str, result: Path, *more: str) -> None:
    """The environment that `accelerate launch` gives its processes, then the run, and what the first has found."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no", "OMP_NUM_THREADS": "1", **KINDS[kind],
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    folder, steps, resume = (Path(more[0]), int(more[1]), more[2] == "resume") if more else (None, 100, False)
    projected = not kind.startswith("zero")
    if not projected:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles that at its first use on a CPU
    found = train(CONFIG["batch_size"], folder, resume=resume, steps=steps, projected=projected)
    (result.with_suffix(f".{rank}")).write_text(json.dumps(found))
    os._exit(0)  # taking the process group down can wait forever for its own threads, which want Python's lock


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]), *sys.argv[6:])
