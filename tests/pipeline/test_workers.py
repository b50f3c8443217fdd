"""Parts in processes of their own: what they make is what one process makes; errors, order and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd import cli
from pykd.errors import RecipeError
from pykd.pipeline import run_study, workers
from pykd.pipeline.workers import Part, PartError, carry_out, device

HELP = ("part", "--help")


def part(name: str, words: tuple[str, ...] = HELP, **options: Any) -> Part:
    return Part(name, words, act=lambda: None, done=lambda: False, **options)


@pytest.mark.usefixtures("pageless")
def test_two_workers_make_what_one_process_makes(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = {"max_steps": 4, "batch_size": 32}
    recipe = {**tiny, "stages": [{"chain": {"students": {"half": {"depth": 1}}, "arms": ["labels"], **training}}]}
    recipe["study"] = {"weights": {"quality": 1.0, "speed": 0.0, "size": 0.0}}
    one = run_study(recipe, output_dir=tmp_path / "one", progress=False)
    two = run_study(recipe, output_dir=tmp_path / "two", progress=False, workers=2)
    weights = [{entry.report.name: entry.sha256 for entry in study.run.measured} for study in (one, two)]
    assert weights[0] == weights[1] and set(weights[0]) == {"teacher", "half-chain", "half-labels"}
    scores = [[(place.name, place.score) for place in study.ranking] for study in (one, two)]
    assert scores[0] == scores[1] and two.run.reload.identical
    assert "half-labels: accuracy" in (tmp_path / "two" / "workers" / "half-labels.log").read_text()
    trained = {json.loads(line)["run"] for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()}
    assert trained == {"half-chain", "half-labels"}, "the teacher was there"


def test_a_part_begins_after_those_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    real = workers.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        begun.append(command[-1])
        return real([*command[:-1], "--help"], **options)

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    parts = [part("b", ("part", "b"), after=("a",)), part("a", ("part", "a")), part("c", ("part", "c"))]
    carry_out(parts, tmp_path, workers=2)
    assert begun == ["a", "c", "b"]
    assert all("Make one part of a study" in (tmp_path / f"{name}.log").read_text() for name in "abc")


def test_a_worker_that_fails_ends_all_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = ("part", "none.yaml", str(tmp_path / "x"))
    with pytest.raises(PartError, match=r"b: its process ended with code 2: .*Missing option '--teachers'.*b\.log"):
        carry_out([part("b", bad)], tmp_path, workers=2)
    caplog.set_level("INFO", logger="pykd")
    carry_out([part("b", bad, may_fail=True), part("a", after=("b",))], tmp_path, workers=2)
    assert "b: left out, its process ended with code 2" in caplog.text and "a: made, 0 to go" in caplog.text


def test_in_this_process_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RecipeError("no such size")

    bad = Part("b", HELP, act=fails, done=lambda: False)
    with pytest.raises(RecipeError, match="no such size"):
        carry_out([bad], tmp_path)
    carry_out([Part("b", HELP, act=fails, done=lambda: False, may_fail=True)], tmp_path)
    assert "b: left out: no such size" in caplog.text


@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_ends_the_workers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.SIG_DFL)"
    code = f"deaf = {deaf}; {code}; print('ready', flush=True); time.sleep(60)"
    started: list[Any] = []
    real = workers.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        started.append(real([command[0], "-c", code], **options))
        return started[-1]

    def press() -> None:
        while not (tmp_path / "slow.log").exists() or "ready" not in (tmp_path / "slow.log").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    monkeypatch.setattr(workers, "GRACE", 0.5 if deaf else 20.0)
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        carry_out([part("slow")], tmp_path, workers=2)
    thread.join()
    assert started[0].returncode == -(signal.SIGKILL if deaf else signal.SIGINT)


def test_devices_and_numbers_of_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert device(1, 2)["OMP_NUM_THREADS"] == "2" and device(0, 8)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [device(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["5", "7", "5"]
    with pytest.raises(ValueError, match=r"workers are processes of their own, one or more.*got 0"):
        carry_out([], tmp_path, workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"without accelerate launch or torchrun; got 2"):
        carry_out([], tmp_path, workers=2)


def test_a_part_that_the_recipe_does_not_have(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**tiny, "stages": [{"chain": {"students": {"half": {"depth": 1}}}}]}))
    words = ["part", str(file), str(tmp_path), "--teachers", str(tmp_path), "--arm", "half-direct"]
    assert cli.main(words) == 2
    assert "has no arm 'half-direct'; it has half-chain, half-labels" in capsys.readouterr().err
