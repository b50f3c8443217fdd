"""Scripts that run in a process that has no pykd."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

#: What a process without pykd begins with; torchvision needs pykd's help beside some builds of torch.
WITHOUT_PYKD = """
import sys
sys.modules["pykd"] = None
sys.modules["torchvision"] = None
"""


def _run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", WITHOUT_PYKD + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def without_pykd() -> Callable[..., str]:
    """Run a script in a new process that cannot import pykd; returns what it printed."""
    return _run
