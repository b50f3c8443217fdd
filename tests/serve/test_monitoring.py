"""Monitoring of a service: a queue that nobody waits for, a log that outlives it, labels that come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pykd.monitoring import Thresholds, read_log
from pykd.monitoring.service_log import SERVICE_LOG, ServiceMonitor
from pykd.serve import monitoring as module
from pykd.serve.monitoring import Monitoring, MonitoringMetrics, Seen, UnknownPredictionError

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
    first = monitoring.label("r-0", "spam")
    assert first == {"model": "m", "predicted": "spam", "correct": True, "labels": 1, "accuracy": 1.0, "f1": 1.0,
                     "alarms": []}  # fmt: skip
    last = [monitoring.label(f"r-{row}", "ham") for row in range(1, 5)][-1]
    assert last["accuracy"] == 0.2 and last["alarms"] == ["accuracy has fallen to 0.2000, below 0.5, over 5 labels"]
    for id in ("r-0", "none"):
        with pytest.raises(UnknownPredictionError, match=f"no prediction '{id}' waits for its label: it is old"):
            monitoring.label(id, "spam")
    registry = CollectorRegistry()
    registry.register(MonitoringMetrics(monitoring))
    assert 'pykd_rolling_accuracy{model="m"} 0.2' in generate_latest(registry).decode()
    events = [event["event"] for event in read_log(tmp_path / "state" / SERVICE_LOG)]
    assert events.count("prediction") == 6 and events.count("label") == events.count("quality") == 5


def test_a_restart_goes_on_where_the_log_ends(make: Make) -> None:
    before = make()
    fill(before, range(30))
    before.label("r29-0", "ham")
    left = before.state()["models"]["m"]
    before.close()
    after = make()
    found = after.state()["models"]["m"]
    assert all(
        found[name] == left[name] for name in ("predictions", "window", "baseline_rows", "quality", "latency_ms")
    )
    lengths = [next(one for one in state["drift"] if one["quantity"] == "length") for state in (found, left)]
    assert lengths[0] == lengths[1]
    assert after.label("r29-1", "spam")["labels"] == 2
    with pytest.raises(UnknownPredictionError):
        after.label("r29-0", "ham")


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
