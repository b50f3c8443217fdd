"""The examples in the docstrings, module by module: they are what users copy first."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import pykd

ROOT = Path(pykd.__file__).parent
FILES = [path.relative_to(ROOT.parent).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
#: Not the kernels, which need Triton, nor the program.
MODULES = [
    ".".join(path.parts).removesuffix(".__init__") for path in FILES if path.parts[1] not in ("kernels", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples of {name} differ: see the captured output"


def test_examples_are_found() -> None:
    modules = ("pykd.ops.kd_loss", "pykd.quantization.quantize", "pykd.distillation.distill")
    for name in modules:
        tests = doctest.DocTestFinder().find(importlib.import_module(name))
        assert any(test.examples for test in tests), name
