"""Two processes that distil by layers, with projections, are one with twice the batch: the verb and the Trainer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .launched import KINDS, losses

SCRIPT = Path(__file__).with_name("launched.py")


def test_two_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), "2", port, str(tmp_path / "losses")])
        for rank in range(2)
    ]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    both = [json.loads((tmp_path / f"losses.{rank}").read_text()) for rank in range(2)]
    for kind in KINDS:
        want = losses(kind, 8, tmp_path / kind)
        for found in both:
            assert len(found[kind]) == 8 and found[kind] == pytest.approx(want, rel=1e-4)
        assert want[-1] < want[0]
