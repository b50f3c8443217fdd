"""What the tests of the recipes that ship share: where they lie, what makes them quick, and how tokenizers are made."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
sys.path.append(str(TESTS.parent / "benchmarks" / "data"))
debian_rows: Any = importlib.import_module("debian_rows")

FAST = ["evaluate.latency_rounds=1", "evaluate.speed_rounds=1", "evaluate.batch_size=20"]
