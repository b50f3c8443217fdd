"""The log of a service: whole lines, rotation, a kill in the middle, and what `pykd monitor` shows of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pykd.cli import main
from pykd.errors import ArtifactError
from pykd.monitoring import log as module
from pykd.monitoring.log import RotatingLog, parse, read_log, rotated
from pykd.monitoring.service_log import ServiceMonitor, is_service_log

WRITER = """
import sys
from pykd.monitoring.log import RotatingLog
log, number = RotatingLog(sys.argv[1], max_bytes=20_000, backups=3), 0
print("ready", flush=True)
while True:
    log.append("prediction", model="m", number=number, text="x" * 200)
    number += 1
"""


def test_lines_rotate_and_none_is_lost_between_files(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "s.jsonl", max_bytes=1000, backups=3)
    for number in range(40):
        log.append("prediction", number=number, text="ä\n" * 5)
    log.close()
    files = rotated(tmp_path / "s.jsonl")
    assert [file.name for file in files] == ["s.jsonl.3", "s.jsonl.2", "s.jsonl.1", "s.jsonl"]
    assert all(file.stat().st_size <= 1000 for file in files)
    numbers = [event["number"] for event in read_log(tmp_path / "s.jsonl")]
    assert numbers == list(range(numbers[0], 40)) and len(numbers) > 20


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while len(rotated(path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
    lines = [line for file in rotated(path) for line in file.read_bytes().splitlines(keepends=True)]
    events = [parse(line) for line in lines]
    assert None not in events and len(events) > 100
    numbers = [event["number"] for event in events if event is not None]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_half_a_line_is_ended_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"time": 1.0, "event": "a"}\n{"time": 2.0, "ev')
    log = RotatingLog(path)
    log.append("b")
    log.close()
    assert [event["event"] for event in read_log(path)] == ["a", "b"]
    assert parse(b"3\n") is None and parse(b'{"event": "a", "time": 1}') is None


def test_what_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RotatingLog(tmp_path / "gone" / "s.jsonl")
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING, "pykd.monitoring.log"):
        log.append("a")
        log.append("b")
    assert len(caplog.records) == 1 and "lines are lost until it can" in caplog.text
    (tmp_path / "gone").mkdir()
    log.append("c")
    log.close()
    assert [event["event"] for event in read_log(tmp_path / "gone" / "s.jsonl")] == ["c"]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder of a service with traffic of two models, its log rotated once."""
    events = [
        {"time": 10 + number / 4, "event": "prediction", "model": "m", "id": str(number), "label": "a",
         "numbers": {"confidence": 0.75, "latency_ms": 2.0}} for number in range(9)
    ]  # fmt: skip
    drift = [{"quantity": "length", "psi": 0.4}, {"quantity": "label", "psi": 0.1}]
    events += [
        {"time": 13, "event": "drift", "model": "m", "drift": drift, "alarms": ["length has shifted"]},
        {"time": 14, "event": "quality", "model": "m", "labels": 60, "accuracy": 0.5, "f1": 0.4, "alarms": ["low"]},
        {"time": 14, "event": "prediction", "model": "n", "numbers": {}},
        {"time": 15, "event": "start"},
    ]
    lines = [json.dumps(event) + "\n" for event in events]
    (tmp_path / "service.jsonl.1").write_text("".join(lines[:5]))
    (tmp_path / "service.jsonl").write_text("".join(lines[5:]))
    return tmp_path


def test_traffic_drift_and_alarms_are_shown(served: Path) -> None:
    monitor = ServiceMonitor(served)
    assert monitor.read() and not monitor.read() and not monitor.ended
    first, second = monitor.rows()
    assert first == (
        "m", "9", "4.00/s", "2.0 / 2.0 / 2.0", "0.750", "length PSI 0.400", "0.5000 of 60", "0.4000 of 60",
        "length has shifted; low",
    )  # fmt: skip
    assert second == ("n", "1", "-", "-", "-", "-", "-", "-", "none")


def test_it_follows_through_a_rotation(served: Path) -> None:
    monitor = ServiceMonitor(served / "service.jsonl")
    monitor.read()
    os.rename(served / "service.jsonl.1", served / "service.jsonl.2")
    os.rename(served / "service.jsonl", served / "service.jsonl.1")
    line = json.dumps({"time": 16, "event": "label", "model": "n"})
    (served / "service.jsonl").write_text(line[:9])
    assert not monitor.read()
    with (served / "service.jsonl").open("a") as log:
        log.write(line[9:] + "\nnoise\n")
    assert monitor.read() and monitor.models["n"].labels == 1 and monitor.torn == 1
    assert monitor.models["m"].predictions == 9


@pytest.mark.parametrize("known", [False, True])
def test_a_rotation_between_two_looks_at_the_folder_loses_and_doubles_nothing(
    served: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The files are listed, then they get other names, then they are opened."""
    log = served / "service.jsonl"
    count = sum(event["event"] == "prediction" and event["model"] == "m" for event in read_log(log))
    monitor, look = ServiceMonitor(log), module.rotated
    if known:
        monitor.read()

    def rotating(path: Path) -> list[Path]:
        found = look(path)
        monkeypatch.setattr(module, "rotated", look)
        for number in (1, 0):
            os.rename(f"{log}.{number}" if number else log, f"{log}.{number + 1}")
        log.write_text(json.dumps({"time": 99, "event": "label", "model": "n"}) + "\n")
        return found

    monkeypatch.setattr(module, "rotated", rotating)
    assert monitor.read()
    assert monitor.models["m"].predictions == count and monitor.models["n"].labels == 1
    assert not monitor.read()
    log.unlink()  # renamed, and no line has been written since
    assert is_service_log(served) and ServiceMonitor(served).read()


def test_the_command_tells_a_service_from_a_run(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert is_service_log(served) and is_service_log(served / "service.jsonl")
    assert not is_service_log(served / "none")
    (served / "events.jsonl").write_text('{"time": 1, "event": "begin", "run": "1-distill"}\n')
    assert not is_service_log(served / "events.jsonl")
    assert main(["monitor", "--once", str(served)]) == 0
    shown = capsys.readouterr().out
    assert "4.00/s" in shown and "length has shifted" in " ".join(shown.split())


def test_what_is_no_service(served: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none does not exist: name the folder of a service, or its log"):
        ServiceMonitor(tmp_path / "none")
    (served / "service.jsonl").write_text('{"time": 1, "event": "prediction", "model": "m"}\n')
    with pytest.raises(ArtifactError, match=r"is no log of a service: b'.*numbers"):
        ServiceMonitor(served).read()
