"""The service as an ASGI application: `create_app(Settings(models=("runs/digits/model",)))`.

How it is put together, for whoever adds to it:

- A part is a file with a function `router(state: State) -> APIRouter`; `PARTS` below lists them, and `create_app`
  includes each. What a part is told comes from `state.settings` (pykd/serve/settings.py: a frozen dataclass, whose
  fields the command line sets); what it keeps belongs to the part, not to the module.
- `state.observers` is the hook of monitoring: callables `observe(answered)` (pykd/serve/state.py: Answered), called in
  the event loop after every `POST /predict` that was answered, so they must return quickly. A part appends its observer
  in its `router` function, and to `state.closing` what is to be done at the end. What one raises is logged and spoils
  no answer.
- `state.models[name]` are the models (pykd/serve/served.py), `state.metrics.registry` the registry of Prometheus,
  `state.public` the paths that need no token (add a page there, never an answer that says anything).
- Before any part, pykd/serve/protocol.py has limited the head of the request, and pykd/serve/doors.py has checked host,
  origin, token, size and arrival time of the body; it counts the request. Every answer that is not the one asked for is
  `{"detail": sentence}`: raise `fastapi.HTTPException(status, sentence)`, or a PykdError for wrong input (422); say
  so by `responses={status: {"model": Problem, ...}}`.
- Slow work goes to a thread, and its answer through `await within(seconds, work, what)`, which gives 504. Streams end
  when `state.stopping` (an asyncio.Event) is set: then the service is being stopped and answers 503 to what is new.
- Paths that a request names go through `below_roots(path, state.settings.roots)` (pykd/serve/roots.py), always.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pykd import __version__
from pykd.errors import PykdError
from pykd.serve import jobs_api, metrics, models, monitoring_api, page, predict
from pykd.serve.batching import QueueFullError
from pykd.serve.doors import REFUSALS, Doors, Problem
from pykd.serve.hold import hold
from pykd.serve.served import load_models
from pykd.serve.settings import Settings
from pykd.serve.state import State

logger = logging.getLogger(__name__)

#: The parts of the service, in the order of its description.
PARTS: tuple[Callable[[State], APIRouter], ...] = (
    predict.router, models.router, metrics.router, monitoring_api.router, jobs_api.router, page.router,
)  # fmt: skip


def create_app(settings: Settings) -> FastAPI:
    """The service with its models loaded; its `State` is `app.state.pykd`.

    Raises ArtifactError, ModelLoadError or ValueError for a model that cannot be served, with the reason, and
    ArtifactError for a state folder that another service holds.
    """
    state = State(settings)
    if settings.state is not None:
        state.closing.append(hold(settings.state))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    state.models.update(load_models(settings, state.metrics, state.compute))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        state.close()

    app = FastAPI(
        title="pykd",
        version=__version__,
        description="Compressed models, served.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.pykd = state
    app.add_middleware(Doors, state=state)
    described = {**REFUSALS, 422: {"model": Problem, "description": "The request is not what it should be"}}
    for part in PARTS:
        app.include_router(part(state), responses=described)
    _handle_errors(app, state)
    if settings.token is not None:
        _describe_token(app, state)
    return app


def _describe_token(app: FastAPI, state: State) -> None:
    """Say in the description which paths want the token."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        content = described()
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in content["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in state.public else [{"token": []}]
        return content

    app.openapi = openapi  # type: ignore[method-assign]


def _handle_errors(app: FastAPI, state: State) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _problem(422, f"{where}: {first['msg']}")

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return _problem(429, str(error), {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(PykdError)
    async def wrong(_: Request, error: PykdError) -> JSONResponse:
        return _problem(422, " ".join(str(error).split()))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return _problem(500, "the service failed; its log says why")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # What came may hold halves of characters, which no answer can.
    return JSONResponse({"detail": detail.encode("utf-8", "replace").decode()}, status, headers)
