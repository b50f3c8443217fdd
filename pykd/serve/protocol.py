"""HTTP on a connection, with limits for what comes before a request's body: httptools waits for it and keeps it all.

Whoever sends no whole head holds one of the connections that the server has, token or not.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pykd.serve.state import State

#: Bytes of a request's line and headers.
HEAD_BYTES = 64 << 10


class Protocol(HttpToolsProtocol):
    """uvicorn's, which closes a connection whose next head is too large or takes longer than ``body_timeout_s``."""

    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        expected = self._deadline
        super().data_received(data)
        if expected is not None and self._deadline is expected:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        state: State = self.config.app.state.pykd  # type: ignore[union-attr]
        self._head_bytes = 0
        self._deadline = self.loop.call_later(state.settings.body_timeout_s, self.transport.close)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
