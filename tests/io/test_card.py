"""The model card: front matter that hubs read, code that runs, what was measured; and a folder that a hub takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from torch import nn

import pykd
from pykd.io.card import model_card, pipeline_task
from pykd.models.huggingface import load_huggingface

STAGES = [
    {"stage": "distill", "method": "logits", "parameters": {"epochs": 3, "losses": {"logits": 1.0}}},
    {"stage": "prune", "method": "magnitude", "parameters": {"sparsity": 0.5}},
    {"stage": "quantize", "method": "rtn", "parameters": {"scheme": "w4a16", "include": None}},
]
MEASURED = [
    {"name": "teacher", "accuracy": 0.9, "size_bytes": 4000, "parameters": 1000},
    {"name": "quantize", "accuracy": 0.89, "size_bytes": 500, "parameters": 1000, "f1": 0.88, "latency_p50_ms": 1.25},
]
PROVENANCE = {
    "recipe": {"teacher": {"name": "org/teacher-base"}},
    "metrics": MEASURED,
    "data": {"name": "sections", "fingerprint": "ab12", "class_names": ["x"], "preprocessing": {}},
}

Models = Callable[[str], nn.Module]


def test_the_front_matter_is_what_hubs_expect(tmp_path: Path, variants: Callable[[str, str], nn.Module]) -> None:
    model: Any = variants("bert", "sparse_4bit")
    model.pykd_report = STAGES
    folder = pykd.save_pretrained(model, tmp_path / "small-bert", provenance=PROVENANCE)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "tags": ["pykd", "distilled", "pruned", "quantized", "w4a16"],
        "base_model": "org/teacher-base",
        "pipeline_tag": "text-classification",
        "metrics": ["accuracy", "f1"],
    }
    text = card.text
    assert text.startswith("# small-bert\n") or "\n# small-bert\n" in text
    assert "| quantize | 0.8900 | 0.8800 | 1,000 | 500 | 1.25 |" in text
    assert "1. distill by logits (epochs=3)\n2. prune by magnitude (sparsity=0.5)" in text
    assert "3. quantize by rtn (scheme=w4a16)" in text and "- fingerprint: ab12" in text
    assert 'pipeline("text-classification", model="FOLDER")' in text and "import pykd" in text


@pytest.mark.parametrize("name", ["/models/teacher", "./model", "a b", "org/team/model", ""])
def test_a_local_folder_is_no_base_model(name: str, models: Models) -> None:
    provenance = {"recipe": {"teacher": {"name": name}}}
    assert "base_model" not in model_card(models("bert"), provenance=provenance, stages=[], compressed=False, name="m")


def test_torchvision_needs_pykd_only_where_something_is_packed(models: Models) -> None:
    for compressed, library, code in ((True, "pykd", "pykd.from_pretrained"), (False, "torchvision", "get_model(")):
        card = model_card(models("resnet18"), provenance={}, stages=[], compressed=compressed, name="m")
        assert f'library_name: "{library}"' in card and code in card


def test_heads_that_no_pipeline_loads_say_their_class() -> None:
    config = {
        "model_type": "t5",
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 20,
        "num_layers": 1,
        "num_heads": 2,
    }
    model = load_huggingface(None, "seq2seq-lm", config=config)
    assert pipeline_task(model) == "text2text-generation"
    card = model_card(model, provenance={}, stages=[], compressed=False, name="m")
    assert 'T5ForConditionalGeneration.from_pretrained("FOLDER")' in card


# A hub on this machine: the part of its protocol that an upload of small files uses.


class Hub(BaseHTTPRequestHandler):
    files: dict[str, Any]

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}/me/small"
        if self.path == "/api/repos/create":
            self.answer({"url": address, "name": "me/small", "id": "me/small"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])  # type: ignore[attr-defined]
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": path, **plain} for path in wanted]})
        else:
            assert "/commit/" in self.path, self.path
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files += [line["value"]["path"] for line in lines if line["key"] == "file"]  # type: ignore[attr-defined]
            self.answer({"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True})

    def log_message(self, *arguments: Any) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.cards = [], []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_hub_takes_the_folder(hub: Any, tmp_path: Path, variants: Callable[[str, str], nn.Module]) -> None:
    folder = pykd.save_pretrained(variants("bert", "4bit"), tmp_path / "model")
    script = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(token='hf_x'); "
        "api.create_repo('me/small', exist_ok=True); "
        "api.upload_folder(repo_id='me/small', folder_path=sys.argv[1])"
    )
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(hub.files) == sorted(file.name for file in folder.iterdir())
    assert hub.cards == [(folder / "README.md").read_text()]
