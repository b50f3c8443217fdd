"""`pykd monitor`: what a growing log of events shows."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from pykd.cli import main
from pykd.errors import ArtifactError
from pykd.pipeline.monitor import Monitor, duration, sparkline


def append(file: Path, *events: dict[str, Any], run: str = "1-distill") -> None:
    with file.open("a", encoding="utf-8") as log:
        for event in events:
            log.write(json.dumps({"run": run, "time": 0.0, **event}) + "\n")


def step(number: int, loss: float, time: float) -> dict[str, Any]:
    return {"event": "step", "step": float(number), "loss": loss, "lr": 1e-3, "time": time}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "events.jsonl"
    append(file, {"event": "begin", "step": 0, "total_steps": 100})
    append(file, *(step(number, 2.0 - number / 10, 10.0 + number / 2) for number in range(1, 7)))
    return file


def test_rate_time_left_and_loss(log: Path) -> None:
    monitor = Monitor(log.parent)
    assert monitor.read() and not monitor.read() and not monitor.ended
    (row,) = monitor.rows()
    assert row[:3] == ("1-distill", "6/100", "1.4000") and row[3][0] == "█" and row[3][-1] == "▁"
    assert row[5:7] == ("2.00/s", "0:47")


def test_a_rollback_takes_steps_back(log: Path) -> None:
    monitor = Monitor(log)
    best = {"event": "validation", "step": 4, "action": "best", "sentence": "f1 0.8 is the best so far"}
    back = {"event": "validation", "step": 6, "action": "roll back", "sentence": "f1 0.7 is -12.50 % against the best"}
    append(log, best, back)
    monitor.read()
    training = monitor.trainings["1-distill"]
    assert training.step == 4 and len(training.records) == 4
    assert next(monitor.rows())[-1] == "roll back: f1 0.7 is -12.50 % against the best"


def test_a_resumed_run_goes_on_where_it_begins_again(log: Path) -> None:
    append(log, {"event": "begin", "step": 3, "total_steps": 100}, step(4, 0.5, 100.0))
    monitor = Monitor(log)
    monitor.read()
    training = monitor.trainings["1-distill"]
    assert [record["step"] for record in training.records] == [1, 2, 3, 4] and training.rate == 0.0


def test_half_a_line_waits_for_its_other_half(log: Path) -> None:
    monitor = Monitor(log)
    monitor.read()
    line = json.dumps({"run": "1-distill", **step(7, 1.0, 14.0)})
    with log.open("a") as file:
        file.write(line[:20])
    assert not monitor.read()
    with log.open("a") as file:
        file.write(line[20:] + "\n")
    assert monitor.read() and monitor.trainings["1-distill"].step == 7


def test_the_command_prints_the_table_where_there_is_no_terminal(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    append(log, {"event": "end", "step": 6, "outcome": "stopped by the guard"})
    append(log, {"event": "begin", "step": 0, "total_steps": 8}, run="3-recover")
    assert main(["monitor", str(log.parent)]) == 0
    shown = capsys.readouterr().out
    assert "stopped by the guard" in shown and "0/8" in shown and "ended" in shown


def test_it_ends_with_the_newest_training(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykd.pipeline import monitor

    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take its output for a terminal
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        append(log, {"event": "end", "step": 6})

    # not `time.sleep` itself: threads that other tests' libraries left behind sleep too
    monkeypatch.setattr(monitor, "time", types.SimpleNamespace(sleep=sleep))
    monitor.watch(log, every=0.5)
    assert slept == [0.5]


def test_a_run_goes_on_after_a_training(log: Path) -> None:
    """Between two trainings of a run their models are measured: it is not over before its folder says so."""
    state = log.with_name("run.json")
    state.write_text(json.dumps({"finished": False}))
    append(log, {"event": "end", "step": 6})
    monitor = Monitor(log.parent)
    assert monitor.read() and not monitor.ended
    append(log, {"event": "begin", "step": 0, "total_steps": 8}, {"event": "end", "step": 8}, run="3-recover")
    assert monitor.read() and not monitor.ended
    state.write_text(json.dumps({"finished": True}))
    assert monitor.ended


def test_a_run_that_was_started_over_is_read_from_its_beginning(log: Path) -> None:
    monitor = Monitor(log)
    monitor.read()
    log.unlink()
    assert monitor.read() and not monitor.trainings and not monitor.read()
    append(log, {"event": "begin", "step": 0, "total_steps": 5}, run="teacher")
    assert monitor.read() and list(monitor.trainings) == ["teacher"]
    log.unlink()
    append(log, {"event": "begin", "step": 0, "total_steps": 500}, step(1, 2.0, 1.0))
    assert monitor.read() and list(monitor.trainings) == ["1-distill"]


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(tmp_path)]) == 2
    assert "events.jsonl does not exist: name the folder of a run" in capsys.readouterr().err
    (tmp_path / "events.jsonl").write_text("hello\n")
    with pytest.raises(ArtifactError, match="is no log of events: b'hello'"):
        Monitor(tmp_path).read()


def test_small_shapes() -> None:
    assert sparkline([]) == "" and sparkline([1.0, 1.0]) == "▁▁" and len(sparkline([float(i) for i in range(99)])) == 24
    assert duration(59.6) == "1:00" and duration(3600) == "1:00:00"
