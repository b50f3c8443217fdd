"""`evaluate`: a real measurement of small models whose right answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pykd
from pykd.data.bundle import DataBundle, stack
from pykd.errors import DataError
from pykd.evaluation import Report, evaluate, predict


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(3, len(weight), bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def test_everything_is_measured(corners: DataBundle, tmp_path: Path) -> None:
    model = linear(4 * torch.eye(3))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = pykd.evaluate(model, corners, name="exact", latency_rounds=7, batch_size=4, path=tmp_path)
    assert (report.name, report.accuracy, report.f1, report.errors) == ("exact", 1.0, 1.0, 0)
    assert (report.parameters, report.nonzero_parameters) == (9, 3)
    assert report.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert 0 < report.latency_p50_ms <= report.latency_p95_ms <= report.latency_p99_ms
    assert report.latency_rounds == 7 and report.throughput_batch == 4 and report.throughput_per_s > 0
    assert report.threads == torch.get_num_threads() and report.device == "cpu"
    assert report.predictions == report.labels == (0, 1, 2) * 3
    assert all(0.9 < value < 1 for value in report.confidences)


def test_mistakes_are_counted_where_they_are(corners: DataBundle) -> None:
    model = linear(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 1]]))
    report = evaluate(model, corners, latency_rounds=1)
    assert report.errors == 3 and report.confusion == ((3, 0, 0), (0, 0, 3), (0, 0, 3))


def test_the_model_is_left_as_it_was(corners: DataBundle) -> None:
    model = nn.Sequential(nn.Dropout(0.9), linear(torch.eye(3))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate(model, corners, latency_rounds=1).accuracy == 1.0
    assert model.training and model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_report_survives_json(corners: DataBundle) -> None:
    report = evaluate(linear(torch.eye(3)), corners, latency_rounds=1).with_speedup("teacher", 2.5)
    again = Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again == report and again.speedup_over == {"teacher": 2.5}


def test_an_unknown_field_is_refused(corners: DataBundle) -> None:
    values = evaluate(linear(torch.eye(3)), corners, latency_rounds=1).to_dict()
    with pytest.raises(ValueError, match="not a report: unknown fields speed"):
        Report.from_dict({**values, "speed": 1})


def test_agreement_needs_the_same_examples(corners: DataBundle) -> None:
    exact = evaluate(linear(torch.eye(3)), corners, latency_rounds=1)
    other = evaluate(linear(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 1]])), corners, name="off", latency_rounds=1)
    assert exact.agreement(other) == pytest.approx(6 / 9)
    few = DataBundle(
        train=corners.train,
        test=[corners.test[i] for i in range(3)],
        collate=stack,
        class_names=("a", "b", "c"),
        name="few",
    )
    with pytest.raises(ValueError, match=r"were measured on different examples \(9 and 3\)"):
        exact.agreement(evaluate(linear(torch.eye(3)), few, latency_rounds=1))


def test_other_classes_than_the_datas_are_refused(corners: DataBundle) -> None:
    with pytest.raises(DataError, match="the model tells 4 classes apart, but 'corners' names 3"):
        evaluate(linear(torch.ones(4, 3)), corners)


def test_scores_that_are_not_finite_are_refused(corners: DataBundle) -> None:
    weight = torch.eye(3)
    weight[2, 2] = float("nan")
    with pytest.raises(DataError, match="scores are not finite for test examples 0 to 1"):
        predict(linear(weight), corners, batch_size=2)


def test_data_must_be_a_bundle() -> None:
    with pytest.raises(TypeError, match="data must be a DataBundle, got list; wrap the splits"):
        evaluate(nn.Identity(), [])  # type: ignore[arg-type]
