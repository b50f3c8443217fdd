"""Every logger of Hugging Face's Trainer writes what a DistillationTrainer reports, to its own files."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("reported.py")


def test_tensorboard_mlflow_and_wandb_get_the_curves(tmp_path: Path) -> None:
    """In a process of its own: the loggers import much, and warn."""
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        found = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        names = {name for (name,) in database.execute("select distinct key from metrics")}
    database.close()
    assert [step for step, _ in found] == [1, 2, 3, 4] and all(0 < value < 2 for _, value in found)
    assert {"eval_loss", "grad_norm", "learning_rate"} <= names
    for pattern in ("out/**/events.out.tfevents.*", "wandb/offline-run-*/run-*.wandb"):
        (file,) = tmp_path.glob(pattern)
        written = file.read_bytes()
        assert all(name in written for name in (b"train/loss", b"eval/loss", b"train/learning_rate")), file
