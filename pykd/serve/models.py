"""`GET /models`, and checks that models load and compute: `GET /verify_all_models`, `POST /test_model`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from pykd.errors import PykdError
from pykd.pipeline.references import REFERENCES, find_reference, unknown_reference
from pykd.pipeline.verified import check_reference, check_saved
from pykd.serve.doors import Problem
from pykd.serve.roots import OutsideRootsError, below_roots, check_folder
from pykd.serve.state import State, within

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ModelFacts(BaseModel):
    """A model that is served. takes: "text" or "image"; labels: names of its classes, in the order of their numbers."""

    name: str
    task: str
    takes: str
    labels: list[str]
    parameters: int
    size_bytes: int
    source: str
    architecture: str


class TestRequest(BaseModel):
    """A reference model (distilbert, t5-small, mobilenet_v2, resnet18), or the path of a folder below a root."""

    __test__ = False  # no test, whatever pytest makes of its name
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_name: str = Field(min_length=1, max_length=1000)


class Check(BaseModel):
    """Whether a model loads and computes: facts about it, or the exact reason why not."""

    model: str
    ok: bool
    source: str | None = None
    revision: str | None = None
    architecture: str | None = None
    classes: int | None = None
    parameters: int | None = None
    nonzero_parameters: int | None = None
    sha256: str | None = None
    forward: str | None = None
    reason: str | None = None
    seconds: float


CHECKED: dict[int | str, dict[str, Any]] = {
    429: {"model": Problem, "description": "Another check is under way; Retry-After says when to try again"},
    504: {"model": Problem, "description": "The check took too long"},
}


def router(state: State) -> APIRouter:
    """The models and their checks."""
    routes = APIRouter(tags=["models"])

    @routes.get("/models", summary="What is served")
    async def models() -> list[ModelFacts]:
        return [ModelFacts(**served.facts) for served in state.models.values()]

    @routes.get("/verify_all_models", summary="Check the reference models and those served", responses=CHECKED)
    async def verify_all_models() -> list[Check]:
        works: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        for reference in REFERENCES:
            works.append((reference.title, lambda name=reference.title: _reference(state, name)))  # type: ignore[misc]
        for served in state.models.values():
            works.append((served.name, lambda folder=served.folder: check_saved(folder)))  # type: ignore[misc]
        return await _run(state, lambda: [_check(name, work) for name, work in works])

    @routes.post(
        "/test_model",
        summary="Check one model",
        responses={**CHECKED, 404: {"model": Problem, "description": "No such model, or not below a root"}},
    )
    async def test_model(body: TestRequest) -> Check:
        name = body.model_name
        if find_reference(name) is not None:
            return await _run(state, lambda: _check(name, lambda: _reference(state, name)))
        try:
            folder = below_roots(name, state.settings.roots)
        except OutsideRootsError as error:
            raise HTTPException(404, f"{error}, nor a reference model: {unknown_reference(name)}") from None
        return await _run(state, lambda: _check(name, lambda: _local(state, folder)))

    return routes


def _reference(state: State, name: str) -> dict[str, Any]:
    return check_reference(name, library=state.settings.library, offline=state.settings.offline)


def _local(state: State, folder: Path) -> dict[str, Any]:
    check_folder(folder, state.settings.roots)
    return check_saved(folder)


def _check(name: str, work: Callable[[], dict[str, Any]]) -> Check:
    started = time.perf_counter()
    try:
        facts = {**work(), "ok": True}
    except PykdError as error:
        facts = {"ok": False, "reason": " ".join(str(error).split())}
    except Exception as error:  # what the library of a model makes of a damaged folder
        logger.warning("%s failed its check", name, exc_info=True)
        facts = {"ok": False, "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    facts["architecture"] = facts.pop("class", None)
    return Check(**{**facts, "model": name, "seconds": time.perf_counter() - started})


async def _run(state: State, work: Callable[[], Result]) -> Result:
    """Check in a thread, one request at a time: models are large."""
    if state.checking:
        raise HTTPException(429, "another check of models is under way", {"Retry-After": "10"})
    state.checking = True
    running = asyncio.get_running_loop().run_in_executor(state.checks, work)

    def done(_: Any) -> None:
        state.checking = False

    running.add_done_callback(done)
    # Shielded: a thread cannot be stopped, and the next check must wait for it.
    return await within(state.settings.check_timeout_s, asyncio.shield(running), "the check")
