"""`import pykd` is cheap, quiet and loads none of the optional libraries."""

from __future__ import annotations

import statistics
import subprocess
import sys

OPTIONAL = {
    "transformers",
    "torchvision",
    "datasets",
    "sklearn",
    "scipy",
    "matplotlib",
    "pandas",
    "pydantic",
    "yaml",
    "typer",
    "tqdm",
    "jinja2",
    "triton",
    "torch_pruning",
    "onnx",
    "onnxruntime",
    "fastapi",
    "PIL",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_adds_less_than_a_tenth_of_a_second() -> None:
    # Timed inside one process, after torch: the noise of loading torch itself does not count. The median of several
    # fresh processes, because one of them may meet another job on the machine.
    code = "import time, torch; t = time.perf_counter(); import pykd; print(time.perf_counter() - t)"
    seconds = statistics.median(float(python(code)) for _ in range(5))
    assert seconds < 0.1, f"import pykd took {seconds:.3f} s after import torch"


def test_import_loads_no_optional_library() -> None:
    # torch itself may load some of them: only what comes on top counts.
    code = (
        "import sys, torch; before = set(sys.modules); import pykd; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert set(python(code).split()) & OPTIONAL == set()


def test_import_prints_nothing_and_every_public_name_exists() -> None:
    assert python("import pykd") == ""
    code = "import pykd; print(*[n for n in pykd.__all__ if not hasattr(pykd, n) or n not in dir(pykd)])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
