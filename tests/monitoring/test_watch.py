"""A model's window against its baseline: shifted texts raise the alarm, others do not; labels come later."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pykd.data.bundle import DataBundle, stack
from pykd.errors import ArtifactError, DataError
from pykd.models.huggingface import load_huggingface
from pykd.models.router import calibrate, from_teacher
from pykd.monitoring import Baseline, HeadInputs, ModelWatch, Prediction, Thresholds, measure_baseline, quantities
from pykd.monitoring.watch import REMEMBERED

from .. import routers

SHORT = Thresholds(window=200, minimum=100, minimum_labels=20)


def rows(
    count: int, *, sharp: float = 2.0, length: float = 20.0, shift: float = 0.0, seed: int = 0
) -> list[Prediction]:
    """Predictions of three classes with embeddings of eight numbers."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        scores = np.exp(sharp * generator.normal(size=3))
        shares = scores / scores.sum()
        vector = (generator.normal(size=8) + shift).astype(np.float32)
        numbers = quantities(shares, length=generator.poisson(length), latency_ms=generator.gamma(5.0))
        found.append(Prediction(f"{seed}-{number}", "abc"[int(shares.argmax())], numbers, vector))
    return found


@pytest.fixture
def baseline() -> Baseline:
    found = rows(600)
    vectors = np.stack([p.vector for p in found if p.vector is not None])
    return Baseline.of("m", [p.numbers for p in found], [p.label for p in found], vectors=vectors)


def fed(baseline: Baseline, predictions: list[Prediction]) -> ModelWatch:
    watch = ModelWatch("m", baseline, SHORT)
    for prediction in predictions:
        watch.predicted(prediction)
    watch.check()
    return watch


def test_unshifted_traffic_raises_no_alarm(baseline: Baseline) -> None:
    watch = fed(baseline, rows(250, seed=1))
    assert watch.alarms == [] and {drift.quantity for drift in watch.drifts} == {*baseline.values, "label"}
    assert {"confidence", "entropy", "length", "latency_ms", "embedding_distance", "embedding_1"} <= set(
        baseline.values
    )


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        ({"sharp": 0.5}, "confidence"),
        ({"sharp": 6.0}, "entropy"),
        ({"length": 40.0}, "length"),
        ({"shift": 2.0}, "embedding_distance"),
    ],
)
def test_shifted_traffic_raises_the_alarm_that_names_it(
    baseline: Baseline, change: dict[str, float], quantity: str
) -> None:
    watch = fed(baseline, rows(250, seed=2, **change))
    assert any(alarm.startswith(f"{quantity} has shifted: PSI") for alarm in watch.alarms)
    others = [alarm for alarm in watch.alarms if alarm.startswith("latency")]
    assert others == []


def test_the_window_rolls_and_an_alarm_ends_with_its_cause(baseline: Baseline) -> None:
    watch = fed(baseline, rows(200, length=60.0, seed=3))
    assert watch.alarms
    for prediction in rows(200, seed=4):
        watch.predicted(prediction)
    assert watch.check() and watch.alarms == [] and watch.state()["window"] == 200


def test_too_few_rows_say_nothing(baseline: Baseline) -> None:
    assert fed(baseline, rows(99, length=60.0, seed=5)).drifts == []


def test_the_first_window_is_the_baseline_where_there_is_none() -> None:
    watch = ModelWatch("m", None, SHORT)
    for prediction in rows(200, seed=6):
        watch.predicted(prediction)
    assert watch.baseline is not None and watch.baseline.rows == 200 and watch.baseline.embeddings is not None
    watch.check()
    assert watch.alarms == [] and all(drift.psi == 0 for drift in watch.drifts)
    for prediction in rows(150, seed=7, shift=2.0):
        watch.predicted(prediction)
    watch.check()
    assert any(alarm.startswith("embedding") for alarm in watch.alarms)


@settings(max_examples=20, deadline=None)  # the first call imports scikit-learn
@given(pairs=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=1, max_size=30))
def test_rolling_quality_is_that_of_the_newest_labels(pairs: list[tuple[str, str]]) -> None:
    watch = ModelWatch("m", None, Thresholds(window=10, minimum=1, minimum_labels=1, accuracy=0.5))
    for number, (answer, label) in enumerate(pairs):
        watch.predicted(Prediction(str(number), answer, {"confidence": 0.5}))
        assert watch.labelled(str(number), label) == answer
    newest = pairs[-10:]
    accuracy = sum(answer == label for answer, label in newest) / len(newest)
    found = watch.quality()
    assert found["labels"] == len(newest) and found["accuracy"] == pytest.approx(accuracy)
    assert bool([alarm for alarm in watch.alarms if alarm.startswith("accuracy has fallen to")]) == (accuracy < 0.5)


def test_quality_waits_for_enough_labels_and_an_id_counts_once() -> None:
    watch = ModelWatch("m", None, Thresholds(window=9, minimum=1, minimum_labels=2, f1=0.9))
    assert watch.quality() == {"labels": 0, "accuracy": None, "f1": None} and watch.state()["latency_ms"] == {}
    for number in "12":
        watch.predicted(Prediction(number, "a", {}))
    watch.labelled("1", "b")
    assert watch.alarms == [] and not watch.knows("1") and watch.knows("2")
    watch.labelled("2", "b")
    assert watch.alarms == ["f1 has fallen to 0.0000, below 0.9, over 2 labels"]
    with pytest.raises(KeyError, match="1"):
        watch.labelled("1", "a")


def test_old_predictions_are_forgotten(baseline: Baseline) -> None:
    watch = ModelWatch("m", baseline, SHORT)
    for number in range(REMEMBERED + 1):
        watch.predicted(Prediction(str(number), "a", {}))
    assert not watch.knows("0") and watch.knows("1")


def test_a_baseline_comes_back_from_its_file(baseline: Baseline, tmp_path: Path) -> None:
    baseline.save(tmp_path / "b.json")
    again = Baseline.load(tmp_path / "b.json")
    assert again.values == baseline.values and again.labels == baseline.labels and again.rows == 600
    assert again.embeddings is not None and baseline.embeddings is not None
    vector = np.ones(8, dtype=np.float32)
    assert again.embeddings.describe(vector) == pytest.approx(baseline.embeddings.describe(vector))
    assert list(tmp_path.iterdir()) == [tmp_path / "b.json"]
    large = Baseline.of("m", [{"length": float(n)} for n in range(5000)], ["a"] * 5000)
    assert len(large.values["length"]) == 1000 and large.values["length"][-1] == 4999 and large.rows == 5000


def test_files_that_are_no_baseline(tmp_path: Path, baseline: Baseline) -> None:
    file = tmp_path / "b.json"
    baseline.save(file)
    sound = json.loads(file.read_text())
    damaged = ({"values": {"length": []}}, {"values": {"length": [float("nan")]}}, {"labels": {}},
               {"embeddings": {"mean": [0.0, 1.0], "directions": [[1.0]]}})  # fmt: skip
    for content in ("", "[]", "{}", *(json.dumps(sound | change) for change in ({"format_version": 9}, *damaged))):
        file.write_text(content)
        with pytest.raises(ArtifactError, match=r"b\.json is no baseline that can be read \(.*\): make it again"):
            Baseline.load(file)
    with pytest.raises(ArtifactError, match="No such file"):
        Baseline.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="as many labels and embeddings as rows, and rows, got"):
        Baseline.of("m", [], [])


def test_probabilities_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected probabilities, got \[nan, 0\.5\]: look for NaN"):
        quantities([float("nan"), 0.5])


class Words(nn.Module):
    """Token numbers to two classes, by the mean of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.classifier = nn.Embedding(50, 6), nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.classifier(self.embedding(input_ids).mean(1))
        return found


def test_a_baseline_from_data_holds_what_the_head_reads() -> None:
    model = Words()
    items = [{"input_ids": torch.randint(0, 50, (7,)), "labels": n % 2} for n in range(30)]
    data = DataBundle(train=items, test=items, collate=stack, class_names=("x", "y"), name="words")
    found = measure_baseline(model, data, batch_size=8)
    assert found.rows == 30 and sum(found.labels.values()) == 30 and set(found.labels) <= {"x", "y"}
    assert found.values["length"] == (7.0,) * 30
    assert found.embeddings is not None and found.embeddings.mean.shape == (6,)
    assert not model.classifier._forward_pre_hooks
    tagged = DataBundle(
        train=items, test=items, collate=stack, class_names=("x", "y"), name="t", task="token-classification"
    )
    with pytest.raises(DataError, match="a baseline is of classes with probabilities, and 't' is for token-class"):
        measure_baseline(model, tagged)


def test_a_router_tells_the_embedding_of_every_row() -> None:
    teacher = load_huggingface(None, "sequence-classification", num_labels=2, config=routers.TINY)
    model = from_teacher(teacher, shared_layers=1, deep_layers=1, experts=2).eval()
    votes = routers.rows(40, 0)
    calibrate(model, [routers.collate(votes)], deep_share=0.5)
    data = DataBundle(train=votes, test=votes, collate=routers.collate, class_names=("no", "yes"), name="votes")
    found = measure_baseline(model, data, batch_size=16)
    assert found.rows == 40 and len(found.values["embedding_distance"]) == 40


def test_each_thread_has_its_own_embeddings() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    inputs, both = HeadInputs(model), threading.Barrier(2)

    def read(value: float) -> bool:
        model(torch.full((2, 4), value))
        both.wait()
        found = inputs.take()
        return found is not None and np.allclose(found, model[0](torch.full((2, 4), value)).detach())

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(read, [1.0, -1.0]))
    assert inputs.take() is None


def test_embeddings_of_many_positions_are_averaged() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    inputs = HeadInputs(model)
    assert inputs.take() is None
    model(torch.ones(2, 7, 4))
    found = inputs.take()
    assert found is not None and found.shape == (2, 5)
    pictures = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1))
    inputs = HeadInputs(pictures)
    hidden = pictures[0](image := torch.randn(2, 3, 5, 7))
    pictures(image)
    np.testing.assert_allclose(inputs.take(), hidden.mean((2, 3)).detach().numpy(), rtol=1e-5, atol=1e-6)
    headless = nn.Module()
    headless.config = type("Config", (), {"num_labels": 2})()
    with pytest.raises(ValueError, match="has no layer with one output for each of its 2 classes"):
        HeadInputs(headless)
