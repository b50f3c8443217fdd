"""One version, in three places that cannot import each other."""

from __future__ import annotations

import pathlib
import re

import pykd
from pykd.ops.dispatch import native

ROOT = pathlib.Path(__file__).parent.parent


def test_one_version_everywhere() -> None:
    cmake = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text().split("project(")[1])
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert cmake is not None and project is not None
    assert pykd.__version__ == cmake[1] == project[1]
    assert native is None or native.version == pykd.__version__
