"""`/jobs` and `/report` over HTTP: a real run from its start to its report, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from pykd.serve import Settings
from pykd.serve.app import create_app
from pykd.serve.jobs import Jobs, UnknownJobError
from pykd.serve.processes import began

from .conftest import ask, client_of
from .running import listening

ID = "0123456789abcdef"
VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TINY = {
    "name": "tiny",
    "description": "a job of seconds",
    "data": {"kind": "digits", "image_size": 8, "test_size": 40},
    "teacher": {"source": "huggingface", "config": VIT, "train": {"max_steps": 4, "batch_size": 16}},
    "student": {"depth": 1},
    "stages": [{"distill": {"max_steps": 300, "batch_size": 8, "checkpoint_steps": 5}}],
    "evaluate": {"latency_rounds": 2, "speed_rounds": 1},
    "short": {"stages[0].distill.max_steps": 3},
}


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return folder


@pytest.fixture
def app(tmp_path: Path, recipes: Path) -> Iterator[FastAPI]:
    made = create_app(Settings(recipes=recipes, state=tmp_path / "state"))
    yield made
    made.state.pykd.close()


def restarted(app: FastAPI) -> FastAPI:
    """The same service after it was stopped and started."""
    app.state.pykd.close()
    return create_app(app.state.pykd.settings)


def write_record(folder: Path, **values: Any) -> None:
    """A job as an earlier service left it."""
    record = {"format_version": 1, "id": ID, "recipe": "tiny.yaml", "file": "tiny.yaml", "verb": "run", "overrides": []}
    file = folder / "state" / "jobs" / f"{ID}.json"
    file.write_text(json.dumps({**record, "short": False, "created": 1.0, **values}))


def stream(client: httpx.Client, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream, until it ends."""
    kind = ""
    with client.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def test_a_real_job_is_watched_and_stopped(app: FastAPI) -> None:
    with listening(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/recipes").json()[0]["recipe"] == "tiny.yaml"
        changes = {"stages[0].distill.lr": 1e-05, "teacher.train.max_steps": 300}
        started = client.post("/jobs", json={"recipe": "tiny.yaml", "set": changes})
        assert started.status_code == 201, started.text
        path = started.headers["location"]
        assert client.get(path.replace("/jobs/", "/report/")).status_code == 404
        stopped = False
        kinds = []
        for kind, state in stream(client, path):
            kinds.append(kind)
            steps = [t["step"] for run in state["runs"] for t in run["trainings"]]
            if not stopped and steps and steps[0] > 2:
                stopped = client.delete(path).json()["status"] == "stopping"
        assert stopped and kinds[-1] == "end" and set(kinds[:-1]) == {"progress"}
        assert state["status"] == "interrupted" and state["exit_code"] == 130
        (training,) = state["runs"][0]["trainings"]
        assert training["name"] == "teacher" and 2 < training["step"] < 300 == training["total_steps"]
        assert "continue with --resume" in state["output"][-1]
        assert client.get(path).json() == state


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"recipe": "../tiny.yaml"}, 422, "unknown recipe '../tiny.yaml': did you mean 'tiny.yaml'?"),
        ({"recipe": "tiny.yaml", "set": {"teacher.name": "/etc"}}, 422, "cannot be set from outside"),
        ({"recipe": "tiny.yaml", "set": {"stages[0].distill.lrr": 1}}, 422, "unknown key 'lrr': did you mean 'lr'?"),
        ({"recipe": "tiny.yaml", "set": {"seed": "\ud800"}}, 422, "tiny.yaml: seed: input should be a valid string"),
        ({"recipe": "tiny.yaml", "more": 1}, 422, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused_says_why(app: FastAPI, body: dict[str, Any], status: int, sentence: str) -> None:
    answer = ask(app, "POST", "/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status and sentence in answer.json()["detail"], answer.text
    assert ask(app, "GET", "/jobs").json() == []


def test_reports_are_found_by_the_name_of_their_run(app: FastAPI, tmp_path: Path) -> None:
    write_record(tmp_path, status="finished", exit_code=0)
    run = tmp_path / "state" / "runs" / ID
    for folder, name in ((run, "tiny"), (run / "next", "next")):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"name": name, "finished": True, "started": name}))
        (folder / "report.html").write_text(f"<html>{name}")
    other = restarted(app)
    for query, want in (("", "tiny"), ("?run=tiny", "tiny"), ("?run=next", "next")):
        page = ask(other, "GET", f"/report/{ID}{query}")
        assert page.text == f"<html>{want}"
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(other, "GET", f"/report/{ID}?run=../jobs").status_code == 404
    shown = ask(other, "GET", f"/jobs/{ID}").json()
    assert sorted(run["name"] for run in shown["runs"]) == ["next", "tiny"] and "file" not in shown
    assert ask(other, "DELETE", f"/jobs/{ID}", params={"remove": True}).status_code == 202
    assert ask(other, "GET", f"/jobs/{ID}").status_code == 404 and not run.exists()


@pytest.mark.parametrize("id", ["fedcba9876543210", "..%2F..%2Fstate", "%00", "tiny.yaml"])
def test_unknown_jobs(app: FastAPI, id: str) -> None:
    requests = [
        ("GET", f"/jobs/{id}"),
        ("DELETE", f"/jobs/{id}"),
        ("POST", f"/jobs/{id}/resume"),
        ("GET", f"/report/{id}"),
    ]
    for method, path in requests:
        answer = ask(app, method, path)
        assert answer.status_code == 404, (method, path, answer.text)


def test_all_places_taken(app: FastAPI, tmp_path: Path) -> None:
    # The first process of the machine: one that runs, and is none of ours.
    write_record(tmp_path, status="running", pid=1, pid_started=began(1))
    other = restarted(app)
    answer = ask(other, "POST", "/jobs", json={"recipe": "tiny.yaml"})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "30", answer.text
    assert ask(other, "POST", f"/jobs/{ID}/resume").status_code == 409
    assert ask(other, "DELETE", f"/jobs/{ID}?remove=true").status_code == 409


def test_without_a_folder_there_are_no_jobs(tmp_path: Path, recipes: Path) -> None:
    assert ask(create_app(Settings()), "GET", "/recipes").status_code == 404
    with pytest.raises(ValueError, match=r"the runs of the recipes in \S+ need a folder: name one by --state"):
        Settings(recipes=recipes)
    with pytest.raises(ValueError, match=r"recipes are looked for in \S+none, which is not a folder"):
        Settings(recipes=tmp_path / "none", state=tmp_path)


def test_a_look_at_a_job_that_must_wait_holds_nobody_up(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    def get(self: Jobs, id: str) -> None:
        free.wait(5)
        raise UnknownJobError("it has been removed")

    async def scenario() -> tuple[float, int]:
        async with client_of(app) as client:
            look = asyncio.create_task(client.get(f"/jobs/{ID}"))
            await asyncio.sleep(0.05)
            began_at = time.monotonic()
            assert (await client.get("/healthz")).status_code == 200
            waited = time.monotonic() - began_at
            free.set()
            return waited, (await look).status_code

    monkeypatch.setattr(Jobs, "get", get)
    waited, status = asyncio.run(scenario())
    assert waited < 4 and status == 404
