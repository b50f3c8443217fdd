"""Monitoring of a service: a queue that nobody waits for, a log that outlives it, labels that come later."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pykd.errors import ArtifactError
from pykd.monitoring import Baseline, Thresholds, read_log
from pykd.monitoring.service_log import SERVICE_LOG, ServiceMonitor
from pykd.serve import monitoring as module
from pykd.serve.monitoring import Monitoring, Seen
from pykd.serve.monitoring_metrics import MonitoringMetrics

THRESHOLDS = Thresholds(window=100, minimum=50, minimum_labels=5, accuracy=0.5)
Make = Callable[..., Monitoring]


def seen(request: str, rows: int, *, length: int = 20, model: str = "m", seed: int = 0) -> Seen:
    """One request's answers by a model of two classes, with embeddings of four numbers."""
    generator = np.random.default_rng(seed)
    sure = generator.uniform(0.5, 1.0, rows)
    return Seen(
        model=model,
        ids=[f"{request}-{row}" for row in range(rows)],
        labels=["spam"] * rows,
        probabilities=[[1 - share, share] for share in sure],
        lengths=generator.poisson(length, rows).tolist(),
        latency_ms=float(generator.gamma(5.0)),
        vectors=generator.normal(size=(rows, 4)),
    )


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(): the monitoring of a service in one and the same folder."""
    made: list[Monitoring] = []

    def start(**options: object) -> Monitoring:
        made.append(Monitoring(tmp_path / "state", THRESHOLDS, every=25, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for monitoring in made:
        monitoring.close()


def fill(monitoring: Monitoring, requests: range, **options: int) -> None:
    for number in requests:
        monitoring.see(seen(f"r{number}", 5, seed=number, **options))  # type: ignore[arg-type]


def test_shifted_lengths_raise_the_alarm_in_state_log_and_metrics(make: Make, tmp_path: Path) -> None:
    monitoring = make()
    fill(monitoring, range(20))
    first = monitoring.state()["models"]["m"]
    assert first["baseline_rows"] == 100 and first["alarms"] == [] and first["predictions"] == 100
    assert (tmp_path / "state" / "baselines" / "m.json").exists()
    fill(monitoring, range(20, 40))
    assert monitoring.state()["models"]["m"]["alarms"] == []
    fill(monitoring, range(40, 60), length=60)
    alarms = monitoring.state()["models"]["m"]["alarms"]
    assert len(alarms) == 1 and alarms[0].startswith("length has shifted: PSI")
    registry = CollectorRegistry()
    registry.register(MonitoringMetrics(monitoring))
    text = generate_latest(registry).decode()
    assert 'pykd_alarms{model="m"} 1.0' in text and 'pykd_drift_psi{model="m",quantity="embedding_distance"}' in text
    assert "pykd_rolling_accuracy{" not in text
    shown = ServiceMonitor(tmp_path / "state")
    shown.read()
    (row,) = shown.rows()
    assert row[1] == "300" and row[-1].startswith("length has shifted")


def test_labels_make_quality_and_its_alarm(make: Make, tmp_path: Path) -> None:
    monitoring = make()
    monitoring.see(seen("r", 6))
    (first,), unknown = monitoring.label([("r-0", "spam"), ("none", "spam")])
    assert first == {"id": "r-0", "model": "m", "predicted": "spam", "correct": True, "labels": 1, "accuracy": 1.0,
                     "f1": 1.0, "alarms": []}  # fmt: skip
    assert unknown == ["none"]
    last = monitoring.label([(f"r-{row}", "ham") for row in range(1, 5)])[0][-1]
    assert last["accuracy"] == 0.2 and last["alarms"] == ["accuracy has fallen to 0.2000, below 0.5, over 5 labels"]
    assert monitoring.label([("r-0", "spam")]) == ([], ["r-0"])
    registry = CollectorRegistry()
    registry.register(MonitoringMetrics(monitoring))
    assert 'pykd_rolling_accuracy{model="m"} 0.2' in generate_latest(registry).decode()
    events = [event["event"] for event in read_log(tmp_path / "state" / SERVICE_LOG)]
    assert events.count("prediction") == 6 and events.count("label") == 5 and events.count("quality") == 2


def test_a_restart_goes_on_where_the_log_ends(make: Make) -> None:
    before = make()
    fill(before, range(30))
    before.label([("r29-0", "ham")])
    left = before.state()["models"]["m"]
    before.close()
    after = make()
    found = after.state()["models"]["m"]
    assert all(
        found[name] == left[name] for name in ("predictions", "window", "baseline_rows", "quality", "latency_ms")
    )
    lengths = [next(one for one in state["drift"] if one["quantity"] == "length") for state in (found, left)]
    assert lengths[0] == lengths[1]
    assert after.label([("r29-1", "spam")])[0][0]["labels"] == 2
    assert after.label([("r29-0", "ham")]) == ([], ["r29-0"])


def test_a_baseline_is_not_made_of_a_log_that_has_no_embeddings(make: Make, tmp_path: Path) -> None:
    before = make()
    fill(before, range(15))
    before.close()
    after = make()
    fill(after, range(15, 24))  # the window is full, with 45 embeddings in it
    assert after.state()["models"]["m"]["baseline_rows"] is None
    fill(after, range(24, 25))
    assert after.state()["models"]["m"]["baseline_rows"] == 100
    fill(after, range(25, 45))
    drift = {found["quantity"] for found in after.state()["models"]["m"]["drift"]}
    assert {"embedding_distance", "embedding_3"} <= drift
    after.close()
    (tmp_path / "state" / "baselines" / "m.json").unlink()
    assert make().state()["models"]["m"]["baseline_rows"] is None


def test_a_baseline_of_another_model_is_named_at_the_start(make: Make) -> None:
    before = make()
    fill(before, range(20))
    before.close()
    with pytest.raises(
        ArtifactError, match=r"m\.json is of another model: its embeddings have 4 numbers, those of m 8"
    ):
        make(widths={"m": 8})
    assert make(widths={"m": 4}).state()["models"]["m"]["baseline_rows"] == 100


def test_a_baseline_that_finds_no_room_is_used_all_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Baseline, path: Path) -> None:
        raise ArtifactError("no space left on the disk")

    monkeypatch.setattr(Baseline, "save", full)
    monitoring = make()
    fill(monitoring, range(30))
    assert monitoring.state()["models"]["m"]["predictions"] == 150
    assert "the next service makes a new baseline of m: no space left on the disk" in caplog.text


def test_lines_of_the_log_that_say_nothing_are_passed_over(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = make()
    fill(before, range(2))
    before.close()
    with (tmp_path / "state" / SERVICE_LOG).open("a") as log:
        for event in ({"event": "prediction"}, {"event": "label", "model": "m"},
                      {"event": "prediction", "model": "m", "id": "x", "label": "a", "numbers": [1]}):  # fmt: skip
            log.write(json.dumps({"time": 1, **event}) + "\n")
    assert make().state()["models"]["m"]["predictions"] == 10
    assert "3 lines of" in caplog.text and "are no events of a service: passed over" in caplog.text


def test_what_comes_meanwhile_is_not_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monitoring, stop = make(), threading.Event()
    take = monitoring._take
    monkeypatch.setattr(monitoring, "_take", lambda each: (time.sleep(0.01), take(each)))

    def crowd() -> None:
        number = 0
        while not stop.wait(0.001):  # ten times what is taken
            monitoring.see(seen(f"c{number}", 1))
            number += 1

    thread, patience = threading.Thread(target=crowd), threading.Timer(8.0, stop.set)
    thread.start()
    patience.start()
    try:
        time.sleep(0.1)
        began = time.monotonic()
        monitoring.flush()
        assert time.monotonic() - began < 6
    finally:
        stop.set()
        patience.cancel()
        thread.join()


def test_what_does_not_fit_into_the_queue_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 1)
    monitoring = make()
    with monitoring._lock:  # the thread holds one and waits, one is in the queue
        for number in range(5):
            monitoring.see(seen(f"r{number}", 2))
    assert monitoring.state()["unwatched"] in (6, 8)


def test_a_prediction_that_cannot_be_watched_stops_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    monitoring = make()
    monitoring.see(Seen("m", ["a"], ["x"], [[]], [1], 1.0))
    monitoring.see(seen("r", 1))
    assert monitoring.state()["models"]["m"]["predictions"] == 1
    assert "a prediction of m could not be watched" in caplog.text


def test_any_name_of_a_model_is_a_file_inside_the_folder(make: Make, tmp_path: Path) -> None:
    monitoring = make()
    for number in range(20):
        monitoring.see(seen(f"r{number}", 5, model="../../evil", seed=number))
    monitoring.close()
    assert [file.name for file in (tmp_path / "state" / "baselines").iterdir()] == ["..%2F..%2Fevil.json"]
    assert make().state()["models"]["../../evil"]["baseline_rows"] == 100
