"""`pykd run` in two processes (gloo): one run on both, which is killed, goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pykd.training.processes import Processes, _portable, environment, launched, on_cpu

DRIVER = Path(__file__).with_name("pipeline_driver.py")
TRAIN = {"max_steps": 3, "batch_size": 8, "checkpoint_steps": 1}
SIZES = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_attention_heads": 2, "intermediate_size": 64}
RECIPE: dict[str, Any] = {
    "name": "launched",
    "data": {"kind": "digits", "image_size": 8, "test_size": 50},
    "teacher": {
        "source": "huggingface",
        "config": {"model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, **SIZES},
        "train": TRAIN,
    },
    "stages": [
        {
            "chain": {
                **TRAIN,
                "students": {"large": {"depth": 1}, "small": {"hidden_size": 32}},
                "arms": [],
                "metric": "f1",
            }
        },
        {"prune": {"sparsity": 0.5}},
        {"recover": {**TRAIN, "method": {"logits": 1.0, "hidden": 1.0}, "guard": {}}},
        {"quantize": {"group_size": 32}},
    ],
    "evaluate": {"latency_rounds": 1, "speed_rounds": 1},
}


def launch(recipe: Path, *points: str) -> list[list[dict[str, Any]]]:
    """What each of two processes says of its runs."""
    with socket.socket() as first, socket.socket() as second, socket.socket() as third, socket.socket() as last:
        free = (first, second, third, last)
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = " ".join(str(each.getsockname()[1]) for each in free)
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PORTS": ports, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), str(recipe), str(recipe.parent / "killed"), *points]
    workers = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    try:
        said = [worker.communicate(timeout=200)[0].splitlines() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    shown = [line for line in said[0] if not line.startswith("{")]
    assert any("all 50 predictions are identical" in line for line in shown)
    assert all(line.startswith("{") for line in said[1])  # the first process speaks for all
    return [[json.loads(line) for line in lines if line.startswith("{")] for lines in said]


def test_a_recipe_in_two_processes(tmp_path: Path) -> None:
    recipe = tmp_path / "launched.yaml"
    recipe.write_text(json.dumps(RECIPE))  # JSON is YAML
    whole, none = tmp_path / "whole", tmp_path / "none"
    found = launch(
        recipe, "train:3-recover:SIGKILL", "end:none", f"fresh={whole}", "end:none", f"again={none}", "end:none"
    )
    killed, resumed, uninterrupted, refused = zip(*found, strict=True)
    assert killed[0]["code"] == -9 and killed[1]["code"] != 0
    assert [each["code"] for each in (*resumed, *uninterrupted)] == [0, 0, 0, 0], (resumed, uninterrupted)
    assert [each["code"] for each in refused] == [2, 2]
    assert "pykd: --resume: there is no run in" in refused[0]["stderr"]
    assert "pykd: process 1: --resume: there is no run in" in refused[1]["stderr"]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "killed", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    log = (tmp_path / "killed" / "run.log").read_text()
    assert log.count("1-chain: finished before, skipped") == 1 and "resumed at step" in log
    report = json.loads((whole / "report.json").read_text())
    assert report["settings"]["reload"]["identical"]
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "begin" and event["run"] == "3-recover" for event in events) == 1


def test_alone_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    together = Processes()
    assert (together.rank, together.count, together.agree(3), together.shared(lambda: 4)) == (0, 1, 3, 4)
    with pytest.raises(KeyError, match="none"):
        together.once(lambda: {}["none"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() and not together.once(launched) and launched()
    assert "WORLD_SIZE" not in environment() and "PATH" in environment()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu()


class PeculiarError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def test_errors_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that cannot be made again from their text, seen from a process that is not the first."""
    assert isinstance(_portable(ValueError("x")), ValueError)
    assert str(_portable(PeculiarError(1, 2))) == "PeculiarError: 1 and 2"
    together = Processes()
    together.rank, together.count = 1, 2
    monkeypatch.setattr(together, "agree", lambda value: ValueError("of the first process"))
    with pytest.raises(ValueError, match="of the first process"):
        together.once(lambda: pytest.fail("only the first process acts"))
