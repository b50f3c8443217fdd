"""Hugging Face models come from the official classes: from a folder, a hub, a configuration, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pykd.errors import ModelLoadError
from pykd.models.huggingface import TASKS, load_huggingface

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    load_huggingface(None, "sequence-classification", num_labels=3, config=BERT).save_pretrained(path)
    return path


def test_every_task_names_a_class_of_transformers() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in TASKS.values())


def test_a_local_folder(folder: Path) -> None:
    first = load_huggingface(str(folder), "sequence-classification")
    second = load_huggingface(str(folder), "sequence-classification", config={"hidden_dropout_prob": 0.3})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.config.hidden_dropout_prob == 0.3


def test_another_number_of_labels_gets_a_new_head(folder: Path) -> None:
    first = load_huggingface(str(folder), "sequence-classification")
    other = load_huggingface(str(folder), "sequence-classification", num_labels=7)
    assert other.classifier.out_features == 7
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_pretrained_layers_may_not_change_shape(folder: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"does not fit its own config with .*'hidden_size': 8.*tensors have another"
    ):
        load_huggingface(str(folder), num_labels=7, config={"hidden_size": 8})


def test_from_scratch() -> None:
    model = load_huggingface(None, "token-classification", num_labels=4, config=BERT)
    assert type(model).__name__ == "BertForTokenClassification"
    assert model.classifier.out_features == 4


def test_unknown_task_and_incomplete_config() -> None:
    with pytest.raises(ModelLoadError, match="unknown task 'sequence-clasification': did you mean 'sequence-class"):
        load_huggingface(None, "sequence-clasification")
    with pytest.raises(
        ModelLoadError, match=r"needs either a name or path, or a config with its model_type.*\['hidden"
    ):
        load_huggingface(None, config={"hidden_size": 3})
    with pytest.raises(ModelLoadError, match="from the config of a 'brrt': ValueError: Unrecognized"):
        load_huggingface(None, config={"model_type": "brrt"})
    with pytest.raises(
        ModelLoadError, match="no model for image-classification can be built from the config of a 'bert'"
    ):
        load_huggingface(None, "image-classification", config=BERT)


def test_what_cannot_be_had_says_which_from_where_why_and_what_to_do(tmp_path: Path) -> None:
    message = r"'nobody/no-such-model' \(revision v1\) could not be loaded .* hub at http.*: OSError: .*Pass the path"
    with pytest.raises(ModelLoadError, match=message):
        load_huggingface("nobody/no-such-model", revision="v1")
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ModelLoadError, match=r"could not be loaded for sequence-classification.*SafetensorError"):
        load_huggingface(str(tmp_path))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"need the package transformers .*pip install 'pykd\[huggingface\]'"):
        load_huggingface(None, config=BERT)


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    """The part of the hub's protocol that downloads need, on this machine: one repository, `tiny/bert`."""
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            data, kind = b"", "application/octet-stream"
            if path.startswith("/api/models/tiny/bert"):
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                data, kind = (
                    json.dumps({"id": "tiny/bert", "sha": commit, "siblings": files}).encode(),
                    "application/json",
                )
            file = folder / path.rpartition("/")[2]
            if path.startswith("/tiny/bert/resolve/") and file.is_file():
                data = file.read_bytes()
            self.send_response(200 if data else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{file.name}-{len(data)}"')
            self.send_header("X-Repo-Commit", commit)
            if not data:
                self.send_header("X-Error-Code", "EntryNotFound" if path.startswith("/tiny/bert") else "RepoNotFound")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FROM_HUB = """
import sys, torch
from pykd.errors import ModelLoadError
from pykd.models.huggingface import load_huggingface
model = load_huggingface("tiny/bert", "sequence-classification")
assert model.config.name_or_path == "tiny/bert"
local = load_huggingface(sys.argv[1], "sequence-classification")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
try:
    load_huggingface("tiny/vit", "image-classification")
except ModelLoadError as error:
    assert "'tiny/vit' could not be loaded" in str(error) and "127.0.0.1" in str(error), error
else:
    raise AssertionError("a repository that does not exist was loaded")
"""


def test_a_hub_is_asked_by_the_official_code(hub: str, folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_HUB, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hub" / "models--tiny--bert").is_dir()
