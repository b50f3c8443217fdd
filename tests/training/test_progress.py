"""What a user sees of a long run."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from pykd.training import progress
from pykd.training.config import TrainConfig
from pykd.training.history import History
from pykd.training.loop import fit


def _fit(show: bool | None) -> None:
    loss = lambda model, batch: (nn.functional.cross_entropy(model(batch["x"]), batch["labels"]), {})  # noqa: E731
    batches = [{"x": torch.ones(2, 4), "labels": torch.tensor([0, 1])} for _ in range(3)]
    fit(nn.Linear(4, 3), batches, loss, TrainConfig(epochs=1), progress=show, label="teacher")


def test_output_to_a_file_gets_log_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "pykd"):
        _fit(None)
    lines = [record.getMessage() for record in caplog.records if record.name == "pykd.training.progress"]
    assert [line.split(",")[0] for line in lines] == [f"teacher: step {step} of 3" for step in (1, 2, 3)]
    assert lines[-1].endswith("0:00 min left")


def test_silence_is_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "pykd"):
        _fit(False)
    assert not caplog.records and not capsys.readouterr().err


def test_the_time_left_counts_the_steps_of_this_process_only() -> None:
    history = History(total_steps=100, records=[{"loss": 1.0} for _ in range(40)])
    shown = progress.Progress(history, "distill", show=False)
    history.records += [{"loss": 0.5} for _ in range(20)]
    assert shown.sentence(40.0) == "distill: step 60 of 100, loss 0.5000, 2.00 s a step, 1:20 min left"
