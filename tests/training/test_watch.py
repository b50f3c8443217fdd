"""Validation and the guard in real runs: sabotaged on purpose, killed on purpose, and left alone."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pykd.errors import TrainingError
from pykd.training import Guard, TrainConfig, fit, run

SCRIPT = Path(__file__).parent / "guarded.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guarded", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


guarded = load_script()


@pytest.fixture(autouse=True)
def _sane() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    run.learning_rate = guarded.SANE
    torch.set_num_threads(threads)


def actions(history: object) -> list[tuple[int, str]]:
    return [(entry["step"], entry["action"]) for entry in history.validations]  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_sabotaged_run_ends_with_its_best_earlier_model_and_says_so(
    on_disk: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded.sabotage(10)
    with caplog.at_level(logging.INFO, "pykd"):
        end, history = guarded.train(tmp_path if on_disk else None)
    assert actions(history) == [
        (0, "best"), (4, "best"), (8, "best"), (12, "roll back"), (12, "roll back"), (12, "stop"),
    ]  # fmt: skip
    assert history.steps == history.kept_step == 8
    best = history.validations[2]
    assert history.outcome == (
        f"stopped by the guard after 2 rollbacks with the model of step 8: loss {best['value']:.6g}"
    )
    assert history.outcome in caplog.text
    assert "rolled back to step 8, learning rate times 0.09" in caplog.text
    run.learning_rate = guarded.SANE
    sane = TrainConfig(**(guarded.CONFIG.to_dict() | {"epochs": 4}))
    model = guarded.network()
    seen = {}

    def keep(model: nn.Module) -> dict[str, float]:
        seen[len(seen) * 4] = guarded.digest(model)
        return {"loss": guarded.accuracy(model)["loss"]}

    fit(model, guarded.bundle(), lambda m, b: (nn.functional.cross_entropy(m(b["pixel_values"]), b["labels"]), {}),
        sane, validate=keep, guard=Guard(), progress=False)  # fmt: skip
    assert end == seen[8]  # bit for bit what an honest run has at that step


def test_one_bad_stretch_is_passed_at_a_lower_rate(tmp_path: Path) -> None:
    guarded.sabotage(9, times=60.0, until=12)
    _, history = guarded.train(tmp_path, guard=Guard(metric="loss", lr_factor=0.02))
    assert (12, "roll back") in actions(history) and history.steps == history.total_steps == 24
    rates = {int(record["step"]): record["lr"] for record in history.records}
    assert rates[8] == pytest.approx(guarded.SANE(7, 24, peak=2e-2, warmup_ratio=0))
    assert rates[10] == pytest.approx(0.02 * 60 * guarded.SANE(9, 24, peak=2e-2, warmup_ratio=0))
    assert history.outcome is not None and history.outcome.startswith("finished after 1 rollback with the model of")


def test_sigkill_at_every_pass_of_a_run_with_rollbacks_does_not_change_its_end(tmp_path: Path) -> None:
    guarded.sabotage(10)
    want, history = guarded.train(None)
    passes = 12 + 4 + 4
    found = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(passes)],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == passes
    decided = [[entry["step"], entry["action"], entry.get("newly_wrong")] for entry in history.validations]
    for line in lines:
        assert line["killed"] == [-signal.SIGKILL] and 1 <= line["states"] <= 3
        assert line["resumed"] == [want, 8, history.outcome, decided]


def test_a_stopped_run_resumes_to_its_end(tmp_path: Path) -> None:
    guarded.sabotage(10)
    end, history = guarded.train(tmp_path)
    again, resumed = guarded.train(tmp_path, resume=True, die_at=0)  # no step is taken
    assert again == end and resumed.outcome == history.outcome


def test_a_gradient_that_is_not_finite_is_taken_back_too() -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
        return (loss * torch.nan if calls == 6 else loss), {}

    history = fit(
        guarded.network(), guarded.bundle(), loss_fn, guarded.CONFIG, validate=guarded.accuracy,
        guard=Guard(metric="loss"), progress=False,
    )  # fmt: skip
    (bad,) = [entry for entry in history.validations if entry["action"] == "roll back"]
    assert bad["sentence"] == (
        "the loss is nan at step 6 of 24: rolled back to step 4, learning rate times 0.3"
    ) and bad["metrics"] == {}  # fmt: skip
    assert history.steps == 24
    json.dumps(history.summary(), allow_nan=False)


def test_validation_alone_changes_nothing_and_tells_what_changed() -> None:
    plain, _ = guarded.train(None, guard=None, validate=None)
    end, history = guarded.train(None, guard=None)
    assert end == plain and history.kept_step is None and history.outcome is None
    assert [entry["step"] for entry in history.validations] == [4, 8, 12, 16, 20, 24]
    entry = history.validations[1]
    assert entry["metric"] == "accuracy" and set(entry["metrics"]) == {"accuracy", "loss"}
    first = history.validations[0]
    moved = entry["newly_right"] - entry["newly_wrong"]
    assert moved == pytest.approx(24 * (entry["value"] - first["value"]))
    assert entry["last_change"] == pytest.approx((entry["value"] - first["value"]) / first["value"])
    assert len(first["examples"]) <= 2 and first["action"] == "best"


def test_without_a_guard_a_worse_model_is_only_noted() -> None:
    guarded.sabotage(10)
    _, history = guarded.train(None, guard=None)
    assert {action for _, action in actions(history)} == {"best", "keep"} and history.steps == 24
    assert any("unguarded" in entry["sentence"] for entry in history.validations)


def test_every_step_is_a_line_of_the_log(tmp_path: Path) -> None:
    guarded.sabotage(10)
    guarded.train(tmp_path / "run", log_file=tmp_path / "logs" / "events.jsonl", label="student")
    events = [json.loads(line) for line in (tmp_path / "logs" / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "begin" and events[0]["total_steps"] == 24 and events[0]["run"] == "student"
    assert [e["step"] for e in events if e["event"] == "step"] == [*range(1, 13), 9, 10, 11, 12, 9, 10, 11, 12]
    assert [e["action"] for e in events if e["event"] == "validation"][-1] == "stop"
    assert events[-1]["event"] == "end" and "stopped by the guard" in events[-1]["outcome"]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    _, history = guarded.train(None, log_file=tmp_path / "file" / "events.jsonl")
    assert history.steps == 24
    assert caplog.text.count("cannot be written") == 1


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="guard needs validate: a function of the model"):
        guarded.train(None, validate=None)
    with pytest.raises(ValueError, match="must return metrics by name, got none"):
        guarded.train(None, validate=lambda model: {})
    with pytest.raises(ValueError, match="the guard's metric 'f1' is not among those of validate: accuracy"):
        guarded.train(None, guard=Guard(metric="f1"), validate=lambda model: {"accuracy": 1.0})
    with pytest.raises(TrainingError, match="the first validation's loss is nan"):
        guarded.train(None, guard=Guard(), validate=lambda model: {"loss": float("nan")})
    with pytest.raises(ValueError, match="does not know whether 'regret' is better"):
        guarded.train(None, guard=Guard(), validate=lambda model: {"regret": 1.0})
    _, history = guarded.train(None, guard=None, validate=lambda model: {"regret": 1.0})
    assert {entry["action"] for entry in history.validations} == {"keep"}
