"""The service as a process: uvicorn, and an end that loses no request."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pykd.serve.app import create_app
from pykd.serve.protocol import Protocol
from pykd.serve.settings import Settings
from pykd.serve.state import State

logger = logging.getLogger(__name__)

#: Connections at a time; each may bring a body of the largest size.
CONNECTIONS = 256


class Server(uvicorn.Server):
    """uvicorn's server. At the first SIGTERM or Ctrl-C it goes on listening until everything under way is answered.

    What comes meanwhile is answered with 503. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self.state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.state.stopping.is_set():
            self.should_exit = self.force_exit = True
            return
        logger.info("stopping: %d requests are under way", self.state.in_flight)
        self.state.stop()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.state.stopped


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, not listening yet, closed at the end. Raises ValueError where there can be none."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            door = stack.enter_context(socket.socket(family, kind, protocol))
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
        except OSError as error:
            raise ValueError(f"{host}, port {port} cannot be listened at ({error.strerror}): choose another") from None
        yield door


def serve(settings: Settings) -> None:
    """Load the models and answer requests until a signal comes. Raises as `create_app` and `bound`.

    Port 0 is one that is free, named in the log.
    """
    with bound(settings.host, settings.port) as door:
        app = create_app(settings)
        state: State = app.state.pykd
        gc.collect()
        gc.freeze()  # models and libraries stay: a full collection would stop all answers while it looks at them
        models = ", ".join(state.models) or "no model"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        logger.info("serving %s at http://%s:%d", models, host, door.getsockname()[1])
        Server(configured(app), state).run([door])


def configured(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", access_log=False, log_config=None, server_header=False,
        limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=1,
    )  # fmt: skip
