"""The proof that what was saved is what was measured: the same predictions from a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pykd.errors import ArtifactError
from pykd.training.processes import environment


@dataclass(frozen=True)
class Reload:
    """What a new process predicted with the saved model, beside the process that made it."""

    command: str
    compared: int
    different: int

    @property
    def identical(self) -> bool:
        """Whether every prediction is the same."""
        return self.different == 0

    def sentence(self) -> str:
        """The result in words."""
        if self.identical:
            return f"reloaded in a new process: all {self.compared} predictions are identical"
        return (
            f"reloaded in a new process: {self.different} of {self.compared} predictions differ from those of the "
            f"model in memory; do not use the saved model, and compare again with `{self.command}`"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"identical": self.identical}


def check_reload(model: Path, recipe: Path, predictions: Sequence[int], *, batch_size: int) -> Reload:
    """Evaluate a saved model in a new Python process and compare its predictions with the given ones.

    Raises ArtifactError when that process fails, with the last line it wrote.
    """
    shown = f"pykd evaluate {model} --recipe {recipe}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "predictions.json"
        command = [sys.executable, "-m", "pykd", "evaluate", str(model), "--recipe", str(recipe)]
        command += ["--threads", str(torch.get_num_threads()), "--batch-size", str(batch_size)]
        command += ["--latency-rounds", "1", "--predictions", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        if done.returncode != 0 or not output.exists():
            last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise ArtifactError(f"the saved model {model} could not be evaluated in a new process: {last}")
        found = json.loads(output.read_text(encoding="utf-8"))["predictions"]
    if len(found) != len(predictions):
        raise ArtifactError(
            f"the new process predicted {len(found)} examples, but the run measured {len(predictions)}: the data "
            "changed meanwhile"
        )
    different = sum(int(a) != int(b) for a, b in zip(found, predictions, strict=True))
    return Reload(command=shown, compared=len(found), different=different)
