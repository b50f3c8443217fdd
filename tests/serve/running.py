"""A service that really listens, in a thread, for clients that need a network: streams and browsers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from pykd.serve.server import bound, configured


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The service's address while it listens; at the end its streams end, and its jobs are stopped."""
    server = uvicorn.Server(configured(app))
    with bound("127.0.0.1", 0) as door:
        thread = threading.Thread(target=server.run, args=([door],))
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            app.state.pykd.stop()
            server.should_exit = True
            thread.join()
