"""A service that really listens, in a thread, for clients that need a network: streams and browsers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The service's address while it listens; at the end its streams end, and its jobs are stopped."""
    config: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "ws": "none", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        app.state.pykd.stop()
        server.should_exit = True
        thread.join()
