"""Losses under DistributedDataParallel: two processes have the gradient of the whole batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("loss", ["kd_loss", "linear_kd_loss"])
def test_two_processes_have_the_gradient_of_the_whole_batch(loss: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), loss]
    places = [str(tmp_path / "rendezvous"), str(tmp_path / "gradients.pt")]
    workers = [subprocess.Popen([*command, str(rank), *places]) for rank in range(2)]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = script.Model(loss)
    model(*script.batch()).backward()
    for got, want in zip(torch.load(places[1]), model.parameters(), strict=True):
        torch.testing.assert_close(got, want.grad)
