"""What every request passes before any of the service's own code: whose it is, whether there is time, how large."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pykd.serve.settings import LOOPBACK_NAMES
from pykd.serve.state import State

#: Path of requests that no route answers, in metrics: there are as many as there are strings.
NOWHERE = "(none)"


class Problem(BaseModel):
    """What every answer says that is not the one asked for."""

    detail: str


#: Answers that the doors give in place of any route.
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not what its headers say, or the host is not this service"},
    401: {"model": Problem, "description": "No token, or not the right one"},
    403: {"model": Problem, "description": "A browser sent it for a page of another site"},
    408: {"model": Problem, "description": "The body took too long to arrive"},
    413: {"model": Problem, "description": "The body is too large"},
    503: {"model": Problem, "description": "The service is being stopped"},
}


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that goes no further."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


class Doors:
    """ASGI middleware: host, token, stop, body; and the metrics of every request."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["pykd_arrived"] = started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.state.in_flight += 1
        try:
            self._check(scope)
            body = await self._body(Headers(scope=scope), receive)
            await self.app(scope, _replay(body, receive), noting)
        except Refused as refused:
            answer = JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
            await answer(scope, receive, noting)
        finally:
            self.state.in_flight -= 1
            self._count(scope, status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        settings, headers = self.state.settings, Headers(scope=scope)
        if settings.token is None and not _at_home(headers.get("host", ""), settings.host):
            # Otherwise a web page whose name was made to point here could talk to the service through a browser.
            raise Refused(400, "this service answers to the names of its own machine only")
        if settings.token is None and scope["path"] not in self.state.public and _foreign(headers):
            # Such a page may not read the answer, but a request alone starts a job or loads a model.
            raise Refused(403, "a page of another site sent this: use the service's own page, or start it with a token")
        if settings.token is not None and scope["path"] not in self.state.public:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + settings.token.encode("ascii")):
                raise Refused(401, "send the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if self.state.stopping.is_set() and scope["path"] != "/healthz":
            raise Refused(503, "the service is being stopped", {"Retry-After": "5", "Connection": "close"})

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within the limits of size and time."""
        settings = self.state.settings
        too_large = Refused(
            413, f"the body has more than {settings.max_body_bytes} bytes: send less", {"Connection": "close"}
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > settings.max_body_bytes:
            raise too_large

        async def read() -> bytes:
            chunks, size = list[bytes](), 0
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the body ended early")
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > settings.max_body_bytes:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)

        try:
            return await asyncio.wait_for(read(), settings.body_timeout_s)
        except asyncio.TimeoutError:
            detail = f"the body did not arrive within {settings.body_timeout_s:g} s"
            raise Refused(408, detail, {"Connection": "close"}) from None

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", NOWHERE)
        metrics = self.state.metrics
        metrics.requests.labels(scope["method"] if path != NOWHERE else NOWHERE, path, status).inc()
        metrics.request_seconds.labels(path).observe(seconds)


def _at_home(host: str, own: str) -> bool:
    name = host if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
    return name.lower() in (*LOOPBACK_NAMES, own)


def _foreign(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin asks; what is no browser sends neither header."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of an application that asks for a body already read."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
