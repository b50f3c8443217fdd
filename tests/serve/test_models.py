"""What is served, and checks of models: facts, or the exact reason why not."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pykd.errors import ArtifactError
from pykd.io.files import sha256
from pykd.io.manifest import MANIFEST
from pykd.models.huggingface import load_huggingface
from pykd.serve import Settings
from pykd.serve import models as part
from pykd.serve.app import create_app
from pykd.serve.served import named

from .conftest import BERT, ask, client_of

Make = Callable[..., FastAPI]


def check(app: FastAPI, name: str) -> httpx.Response:
    return ask(app, "POST", "/test_model", json={"model_name": name})


def test_models_says_what_is_served(make_app: Make) -> None:
    first, second = ask(make_app("text", "image"), "GET", "/models").json()
    assert first["name"] == "text" and first["labels"] == ["images", "sound", "net"] and first["takes"] == "text"
    assert first["architecture"] == "BertForSequenceClassification" and first["parameters"] > 0 < first["size_bytes"]
    assert second["task"] == "image-classification" and second["labels"] == list("0123456789")


def test_the_four_reference_models_by_any_spelling(make_app: Make, library: Path) -> None:
    app = make_app(library=library)
    for name, title in (("DistilBERT", "distilbert"), ("T5-Small", "t5"), ("mobilenetv2", "mobilenet"),
                        ("RESNET_18", "resnet")):  # fmt: skip
        said = check(app, name).json()
        assert said["ok"] and said["model"] == name and title in said["source"].lower(), said
        assert said["forward"].startswith("logits (1, ") and len(said["sha256"]) == 64 and said["parameters"] > 1000
        assert "reason" in said and said["reason"] is None and said["revision"]


def test_why_a_reference_model_is_not_usable(make_app: Make, tmp_path: Path) -> None:
    (tmp_path / "t5-small").mkdir()
    (tmp_path / "t5-small" / "config.json").write_text("{}")
    app = make_app(library=tmp_path)
    for name, reason in (("t5", "holds no model.safetensors: weights are read from safetensors only"),
                         ("distilbert", "DistilBERT could not be had from"),
                         ("resnet18", "holds no weights of ResNet-18, resnet18*.safetensors")):  # fmt: skip
        said = check(app, name).json()
        assert not said["ok"] and reason in said["reason"] and said["parameters"] is None


def test_a_local_folder_below_a_root(folders: dict[str, Path]) -> None:
    root = folders["text"].parent
    app = create_app(Settings(roots=(root,)))
    for name in ("text", str(root / "text"), "./tags/../text"):
        said = check(app, name).json()
        assert said["ok"] and said["architecture"] == "BertForSequenceClassification" and said["classes"] == 3
        assert (
            said["sha256"] == sha256(root / "text" / "model.safetensors") and said["forward"] == "logits (1, 3), finite"
        )


def test_damage_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["text"], tmp_path / "text")
    with (tmp_path / "text" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    said = check(create_app(Settings(roots=(tmp_path,))), "text").json()
    assert not said["ok"] and "model.safetensors is altered: expected sha256" in said["reason"]


def test_whatever_a_folder_makes_of_its_loading_is_the_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["text"], tmp_path / "text")
    manifest = tmp_path / "text" / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "provenance": {"data": [1]}}))
    app = create_app(Settings(roots=(tmp_path,)))
    said = check(app, "text").json()
    assert not said["ok"] and said["reason"] == "AttributeError: 'list' object has no attribute 'get'"


@pytest.mark.parametrize("name", ["../text", "/etc", "none", "gpt2", "text\0", "text" * 200])
def test_other_names_are_404(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(folders["text"], tmp_path / "text")
    answer = check(create_app(Settings(roots=(tmp_path / "root",))), name)
    assert answer.status_code == 404 and "is not below an allowed folder" in answer.json()["detail"]
    assert "distilbert, mobilenetv2, resnet-18, t5-small" in answer.json()["detail"]


def test_all_models_are_checked(make_app: Make, library: Path) -> None:
    found = ask(make_app("text", library=library), "GET", "/verify_all_models").json()
    assert [each["model"] for each in found] == ["DistilBERT", "T5-small", "MobileNetV2", "ResNet-18", "text"]
    assert all(each["ok"] for each in found)


def test_one_check_at_a_time_and_not_for_ever(make_app: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    def slow(*_: Any, **__: Any) -> dict[str, Any]:
        free.wait(5)
        return {}

    monkeypatch.setattr(part, "check_reference", slow)
    app = make_app(check_timeout_s=0.3)

    async def scenario() -> list[httpx.Response]:
        async with client_of(app) as client:
            bodies = [{"model_name": "t5"}] * 2
            return list(await asyncio.gather(*(client.post("/test_model", json=body) for body in bodies)))

    late, refused = asyncio.run(scenario())
    assert late.status_code == 504 and late.json()["detail"] == "the check took longer than 0.3 s"
    assert refused.status_code == 429 and refused.headers["retry-after"] == "10"
    free.set()


def test_what_cannot_be_served_is_refused_at_the_start(
    folders: dict[str, Path], tmp_path: Path, word_tokenizer: Callable[..., Any]
) -> None:
    def start(*models: str) -> None:
        create_app(Settings(models=models))

    text = folders["text"]
    with pytest.raises(ValueError, match="two models are called 'text': name them apart, NAME=FOLDER"):
        start(str(text), f"text={folders['tags']}")
    with pytest.raises(ArtifactError, match="none is not a folder: name one that pykd saved"):
        start("none")
    with pytest.raises(ValueError, match="'=none' names no model: write NAME=FOLDER, or FOLDER alone"):
        start("=none")
    assert named(str(shutil.copytree(text, tmp_path / "lr=0.1"))) == ("lr=0.1", tmp_path / "lr=0.1")
    config = {**BERT, "vocab_size": 9}
    for kind, task, labels, message in (
        ("base", "masked-lm", None, "holds a BertForMaskedLM, which is not served"),
        ("regression", "sequence-classification", 1, "has one output, a regression: served are classifiers"),
        ("mute", "sequence-classification", 2, "holds no tokenizer: save the model with one"),
    ):
        load_huggingface(None, task, num_labels=labels, config=config).save_pretrained(tmp_path / kind)  # type: ignore[operator]
        with pytest.raises(ArtifactError, match=message):
            start(str(tmp_path / kind))


def test_a_tokenizer_that_cannot_be_trusted_with_time_is_refused() -> None:
    from pykd.serve.texts import Reader

    with pytest.raises(ArtifactError, match="slow has no fast tokenizer"):
        Reader(load_huggingface(None, config={**BERT, "vocab_size": 9}), object(), 9, "slow")
