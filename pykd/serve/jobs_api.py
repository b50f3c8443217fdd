"""`/recipes`, `/jobs` and `/report`: recipes started, watched while they run, stopped, resumed, and their reports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, HTTPException, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pykd.errors import RecipeError
from pykd.serve.allowed import AllowedRecipes
from pykd.serve.doors import Problem
from pykd.serve.job_records import Job
from pykd.serve.jobs import Jobs, JobStateError, TooManyJobsError, UnknownJobError
from pykd.serve.progress import Progress, report_of, tail
from pykd.serve.state import State

#: Seconds between two looks at a job that is watched, and between two signs of life where nothing changes.
LOOK_S, ALIVE_S = 0.3, 15.0
#: A client that finds all places taken may ask again after so many seconds.
RETRY_S = 30
EVENTS = "text/event-stream"
#: A report has its own style inside and pictures as data; nothing in it may run or fetch anything.
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox; frame-ancestors 'self'"

Result = TypeVar("Result")
Described = dict[int | str, dict[str, Any]]
UNKNOWN: Described = {404: {"model": Problem, "description": "No such job, or it has no report yet"}}
FULL: Described = {429: {"model": Problem, "description": "As many jobs run as are allowed"}}
STATE: Described = {409: {"model": Problem, "description": "The job is not in a state for this"}}
WRONG: Described = {422: {"model": Problem, "description": "No such recipe, or it cannot be changed like this"}}


class JobRequest(BaseModel):
    """A recipe to start."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(max_length=200, description="file name in the allowed folder, as GET /recipes lists them")
    set: dict[str, JsonValue] = Field(
        default_factory=dict, max_length=64, description="changes by dotted key, as stages[0].distill.epochs"
    )
    short: bool = Field(False, description="apply the recipe's own settings for a quick try")


def router(state: State) -> APIRouter:
    """The routes; without a folder of recipes there are none to start."""
    routes, settings = APIRouter(tags=["jobs"]), state.settings
    if settings.recipes is None or settings.state is None:
        return routes
    jobs = Jobs(settings.state, AllowedRecipes(settings.recipes), limit=settings.max_jobs)
    state.closing.append(jobs.close)

    @routes.get("/recipes", summary="Recipes that may be started")
    def recipes() -> list[dict[str, Any]]:
        return jobs.recipes.describe()

    @routes.post("/jobs", status_code=201, summary="Start a recipe", responses=FULL | WRONG)
    def start(request: JobRequest, response: Response) -> dict[str, Any]:
        job = told(lambda: jobs.start(request.recipe, request.set, short=request.short))
        response.headers["Location"] = f"/jobs/{job.id}"
        return job.public()

    @routes.get("/jobs", summary="All jobs, oldest first")
    def listed() -> list[dict[str, Any]]:
        return [job.public() for job in jobs.list()]

    @routes.get(
        "/jobs/{id}",
        summary="One job; with Accept: text/event-stream its progress as it happens",
        responses=UNKNOWN | {200: {"content": {"application/json": {}, EVENTS: {"schema": {"type": "string"}}}}},
        response_model=None,
    )
    async def shown(id: str, accept: Annotated[str, Header()] = "*/*") -> Response | dict[str, Any]:
        job = await run_in_threadpool(told, lambda: jobs.get(id))  # may wait for another that is started or removed
        watched = Progress(jobs.run(id))
        if EVENTS in accept:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            content = events(jobs, job, watched, state.stopping)
            return StreamingResponse(content, media_type=EVENTS, headers=headers)
        return await run_in_threadpool(state_of, jobs, id, watched)

    @routes.post("/jobs/{id}/resume", summary="Continue an interrupted or failed job", responses=UNKNOWN | FULL | STATE)
    def resume(id: str) -> dict[str, Any]:
        return told(lambda: jobs.resume(id)).public()

    @routes.delete(
        "/jobs/{id}", status_code=202, summary="Stop a job; it leaves a checkpoint", responses=UNKNOWN | STATE
    )
    def stop(
        id: str, remove: Annotated[bool, Query(description="delete the files of a job that has ended")] = False
    ) -> dict[str, Any]:
        job = told(lambda: jobs.get(id) if remove else jobs.stop(id))
        if remove:
            told(lambda: jobs.remove(id))
        return job.public()

    @routes.get("/report/{id}", summary="report.html of a job", response_class=HTMLResponse, responses=UNKNOWN)
    def report(
        id: str, run: Annotated[str | None, Query(description="a run by name, where recipes follow each other")] = None
    ) -> HTMLResponse:
        job = told(lambda: jobs.get(id))
        file = report_of(jobs.run(job.id), run)
        if file is None:
            raise HTTPException(404, f"job {job.id} has no report yet: it is {job.status}")
        page = file.read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})

    return routes


def told(act: Callable[[], Result]) -> Result:
    """The result, or what went wrong as an answer of HTTP."""
    try:
        return act()
    except UnknownJobError as error:
        raise HTTPException(404, _plain(error)) from None
    except TooManyJobsError as error:
        raise HTTPException(429, _plain(error), headers={"Retry-After": str(RETRY_S)}) from None
    except JobStateError as error:
        raise HTTPException(409, _plain(error)) from None
    except RecipeError as error:
        raise HTTPException(422, _plain(error)) from None


def state_of(jobs: Jobs, id: str, progress: Progress) -> dict[str, Any]:
    """A job with its runs, and the end of what its process printed."""
    job = jobs.get(id)
    return {**job.public(), "runs": progress.snapshot(), "output": tail(jobs.output(id))}


async def events(jobs: Jobs, job: Job, progress: Progress, stopping: asyncio.Event) -> AsyncIterator[str]:
    """``progress`` whenever something has changed, ``end`` when the job has ended; comments as signs of life."""
    before, silent = "", 0.0
    while not stopping.is_set():
        try:
            state = await run_in_threadpool(state_of, jobs, job.id, progress)
        except UnknownJobError:  # removed meanwhile
            return
        text = json.dumps(state)
        ended = state["status"] not in ("running", "stopping")
        if text != before or ended:
            before, silent = text, 0.0
            yield f"event: {'end' if ended else 'progress'}\ndata: {text}\n\n"
        elif silent >= ALIVE_S:
            silent = 0.0
            yield ": alive\n\n"
        if ended:
            return
        try:
            await asyncio.wait_for(stopping.wait(), LOOK_S)
        except asyncio.TimeoutError:
            silent += LOOK_S


def _plain(error: Exception) -> str:
    """A sentence that any client can read: without lone surrogates, which are no text."""
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
