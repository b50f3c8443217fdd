"""Runs of two processes (gloo) that are the run of one process with twice the batch, also when killed and resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pykd.training import TrainConfig
from pykd.training.engine import Engine, Launched, engine_for

SCRIPT = Path(__file__).with_name("launched.py")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launched = load_script()


def together(kind: str, result: Path, *more: str) -> tuple[int, int | None]:
    """Exit statuses of two processes with a rendezvous of their own; the second is killed when the first has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", port, kind, str(result), *more], stderr=subprocess.DEVNULL
        )
        for rank in range(2)
    ]
    try:
        first = workers[0].wait(120)
        return first, workers[1].wait(120 if first == 0 else 0.1)
    except subprocess.TimeoutExpired:  # the other one waits for a process that is dead
        return first, None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def close(found: list[Any], want: list[Any]) -> None:
    """The curves to one part in ten thousand, and the weights."""
    for got, expected in zip(found[:3], want[:3], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=0)
    assert found[3].keys() == want[3].keys()
    for name, value in want[3].items():
        torch.testing.assert_close(torch.tensor(found[3][name]), torch.tensor(value), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_two_processes_are_one_with_twice_the_batch(kind: str, tmp_path: Path) -> None:
    assert together(kind, tmp_path / "whole") == (0, 0)
    first, second = (json.loads((tmp_path / f"whole.{rank}").read_text()) for rank in range(2))
    assert first == second
    want = launched.train(8, projected=not kind.startswith("zero"))
    assert len(want[0]) == 9 and want[2][-1] < want[2][0]
    close(first, want)
    if kind == "ddp":  # what is whole in every process anyway
        return
    more = [str(tmp_path / "checkpoints"), "5"]
    assert together(kind, tmp_path / "dead", *more, "fresh")[0] == 7
    assert (tmp_path / "checkpoints" / "checkpoint.json").exists()
    assert together(kind, tmp_path / "again", more[0], "100", "resume") == (0, 0)
    assert json.loads((tmp_path / "again.0").read_text()) == first


def test_fsdp1_is_refused() -> None:
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "DDP, FSDP2 and DeepSpeed's ZeRO, this launch is configured for FSDP: set fsdp_version: 2" in done.stderr


@pytest.mark.parametrize(
    ("settings", "config", "sentence"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, r"configured for stage 3: .*FSDP2 for weights in shares"),
        ({}, {}, r"configured for stage 0: launch without DeepSpeed for stage 0 \(DDP\)"),
        ({"optimizer": {}, "scheduler": {}}, {}, "has optimizer and scheduler, which the training settings decide"),
        ({}, {"autocast": "float16"}, "under DeepSpeed float16 belongs in its configuration"),
    ],
)
def test_what_deepspeed_is_not_to_decide(
    settings: dict[str, Any], config: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"zero_optimization": {"stage": 1}} if "optimizer" in settings else {}

    def begin(self: Launched, *_: Any) -> None:
        plugin = SimpleNamespace(deepspeed_config=stages | settings)
        self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(Launched, "__init__", begin)
    with pytest.raises(ValueError, match=sentence):
        engine_for(TrainConfig(**config), torch.device("cpu"))


def test_deepspeed_scales_the_loss_for_float16_and_resumes_with_its_scale(tmp_path: Path) -> None:
    settings = {
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": True, "initial_scale_power": 22, "hysteresis": 1},
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    command = [sys.executable, "-c", SCALED, str(tmp_path / "checkpoints")]
    told = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "deepspeed.json"), "ACCELERATE_MIXED_PRECISION": "fp16"}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **launched.KINDS["zero2"], **alone, **told, "ACCELERATE_DYNAMO_BACKEND": "no"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    whole, again = json.loads(done.stdout.splitlines()[-1])
    skipped = [record["skipped"] for record in whole["records"]]
    assert skipped[:3] == [1.0] * 3 and 0.0 in skipped, (
        "the scale begins too high, and falls until gradients are finite"
    )
    assert whole == again, "also the scale is taken up where the run was stopped"


def test_deepspeed_takes_no_modules_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "takes_modules", False)
    with pytest.raises(ValueError, match="learned projections lie outside the model that DeepSpeed takes apart"):
        launched.train(4)


#: A run on float16, and one that is stopped after step 7 and goes on from its checkpoint of step 4.
SCALED = """
import json, os, sys
import deepspeed, torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from pykd.training import TrainConfig, fit
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles that at its first use on a CPU
type(get_accelerator()).is_fp16_supported = lambda self: True  # it is, if slowly, on any CPU

def train(stop, folder=None, resume=False):
    torch.manual_seed(0)
    model, calls = nn.Linear(6, 3), 0
    batches = [{"x": torch.randn(8, 6), "labels": torch.randint(3, (8,))} for _ in range(4)]
    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        assert calls <= stop
        return nn.functional.cross_entropy(model(batch["x"].half()).float(), batch["labels"]), {}
    config = TrainConfig(epochs=3, lr=1e-2, checkpoint_steps=4)
    history = fit(model, batches, loss_fn, config, checkpoint_dir=folder, resume=resume, progress=False)
    return {"records": history.records, "weights": {name: value.tolist() for name, value in model.state_dict().items()}}

whole = train(99)
try:
    train(7, sys.argv[1])
except AssertionError:
    again = train(99, sys.argv[1], resume=True)
print(json.dumps([whole, again]), flush=True)
os._exit(0)
"""

REFUSED = """
import os, torch
os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    ACCELERATE_USE_CPU="true", ACCELERATE_DYNAMO_BACKEND="no", ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")
from unittest import mock
import accelerate
from accelerate.utils import DistributedType
from pykd.training.config import TrainConfig
from pykd.training.engine import engine_for
with mock.patch.object(accelerate.Accelerator, "distributed_type", DistributedType.FSDP):
    engine_for(TrainConfig(), torch.device("cpu"))
"""


def test_a_process_that_was_not_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    engine = engine_for(TrainConfig(), torch.device("cpu"))
    assert type(engine) is Engine and (engine.rank, engine.processes) == (0, 1)
