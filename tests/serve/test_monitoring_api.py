"""`/feedback`, `/monitoring` and what `/metrics` says of both, behind real predictions."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from pykd import from_pretrained
from pykd.data import load_digits
from pykd.errors import ArtifactError
from pykd.monitoring import Thresholds
from pykd.monitoring.measure import measure_baseline
from pykd.serve import Settings
from pykd.serve.app import create_app
from pykd.serve.labels import MEDIA_TYPE

from .conftest import ask, predict

THRESHOLDS = Thresholds(window=60, minimum=40, minimum_labels=4, accuracy=0.6)
SHORT, LONG = ["plays music", "plays", "images", "the network"], ["the network daemon that answers every request"]


@pytest.fixture
def app(tmp_path: Path, folders: dict[str, Path]) -> Iterator[FastAPI]:
    models = (f"words={folders['text']}", f"tags={folders['tags']}")
    made = create_app(Settings(models=models, state=tmp_path / "state", thresholds=THRESHOLDS))
    yield made
    made.state.pykd.close()


def test_shifted_texts_raise_the_alarm_and_others_do_not(app: FastAPI) -> None:
    for _ in range(3):
        assert predict(app, model="words", text=SHORT * 10).status_code == 200
    predict(app, model="tags", text=LONG)
    calm = ask(app, "GET", "/monitoring").json()["models"]
    assert list(calm) == ["words"] and calm["words"]["alarms"] == [] and calm["words"]["baseline_rows"] == 60
    assert {"confidence", "length", "embedding_distance"} <= {found["quantity"] for found in calm["words"]["drift"]}
    for _ in range(3):
        predict(app, model="words", text=LONG * 40)
    alarms = ask(app, "GET", "/monitoring").json()["models"]["words"]["alarms"]
    assert any(alarm.startswith("length has shifted: PSI") for alarm in alarms)
    text = ask(app, "GET", "/metrics").text
    assert f'pykd_alarms{{model="words"}} {len(alarms)}.0' in text


def test_true_labels_come_by_the_id_of_the_prediction(app: FastAPI) -> None:
    said = predict(app, model="words", text=SHORT).json()["predictions"]
    labels = [{"id": said[0]["id"], "label": said[0]["label"]}]
    labels += [{"id": each["id"], "label": "none of these"} for each in said[1:]]
    answer = ask(app, "POST", "/feedback", json={"labels": [*labels, {"id": "unknown", "label": "x"}]})
    taken, unknown = answer.json()["taken"], answer.json()["unknown"]
    assert unknown == ["unknown"] and [each["correct"] for each in taken] == [True, False, False, False]
    assert taken[-1]["accuracy"] == 0.25
    assert taken[-1]["alarms"] == ["accuracy has fallen to 0.2500, below 0.6, over 4 labels"]
    assert 'pykd_rolling_accuracy{model="words"} 0.25' in ask(app, "GET", "/metrics").text
    packed = predict(app, {"Accept": MEDIA_TYPE}, model="words", text=SHORT)
    one = {"id": packed.headers["x-prediction-id"], "label": "sound"}
    assert ask(app, "POST", "/feedback", json={"labels": [one]}).json()["unknown"] == []
    assert ask(app, "POST", "/feedback", json={"labels": []}).status_code == 422


def test_images_are_held_against_a_baseline_of_their_data_without_a_length(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    data = load_digits(image_size=16)
    file = tmp_path / "state" / "baselines" / "image.json"
    measure_baseline(from_pretrained(folders["image"]), data, name="image").save(file)
    app = create_app(Settings(models=(str(folders["image"]),), state=tmp_path / "state", thresholds=THRESHOLDS))
    shown = [item["pixel_values"] for item in itertools.islice(data.test, 60)]
    assert predict(app, image=[drawn(pixels, data.preprocessing) for pixels in shown]).status_code == 200
    found = ask(app, "GET", "/monitoring").json()["models"]["image"]
    assert {"confidence", "embedding_distance", "label"} <= {drift["quantity"] for drift in found["drift"]}
    assert found["alarms"] == []
    app.state.pykd.close()


def drawn(pixels: torch.Tensor, made_for: dict[str, Any]) -> str:
    """The picture that a tensor was made of, in base64."""
    mean, std = (torch.tensor(made_for[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    shades = (255 * (pixels * std + mean)).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    Image.fromarray(shades.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_one_service_a_folder(app: FastAPI, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"state is in use by another service: stop it, or choose another --state"):
        create_app(app.state.pykd.settings)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file cannot be used \(File exists\): choose another --state"):
        create_app(Settings(state=tmp_path / "file"))
    app.state.pykd.close()
    again = create_app(app.state.pykd.settings)
    again.state.pykd.close()
