"""A headless Chromium that a test drives: pages opened, scripts evaluated in them, what their policy refused."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
#: Chromium speaks its DevTools protocol on file descriptors 3 and 4, messages ended by a zero byte.
LAUNCH = (
    "import os, sys; read, write = map(int, sys.argv[1:3]); os.dup2(read, 3); os.dup2(write, 4);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
         "--window-size=1200,3000")  # fmt: skip


class Browser:
    """One browser with one page, to be closed. ``said``: what the page's console and its policy said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._numbers = itertools.count(1)
        self._folder = tempfile.mkdtemp(prefix="pykd-browser-")
        executable = next(filter(None, map(shutil.which, EXECUTABLES)))
        ours_read, theirs_write = (_high(end) for end in os.pipe())
        theirs_read, ours_write = (_high(end) for end in os.pipe())
        theirs = (theirs_read, theirs_write)
        command = [
            sys.executable,
            "-c",
            LAUNCH,
            *map(str, theirs),
            executable,
            *FLAGS,
            f"--user-data-dir={self._folder}",
        ]
        self._process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for end in theirs:
            os.close(end)
        self._read, self._write = os.fdopen(ours_read, "rb"), os.fdopen(ours_write, "wb")
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.page(f"{domain}.enable")

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while (found := self._message()).get("id") != number:
            if found["method"] == "Log.entryAdded":
                self.said.append(found["params"]["entry"]["text"])
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def page(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command for the page."""
        return self.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression in the page, as JSON; promises are awaited."""
        found = self.page("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            text = "document.body.innerText"
            assert time.monotonic() < end, f"{script} stays {found!r}; the page says: {self.run(text)}"
            time.sleep(0.05)
        return found

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.page("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(20)
        self._read.close()
        self._write.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            added = os.read(self._read.fileno(), 1 << 16)
            assert added, "the browser has ended"
            self._rest += added
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found


def _high(end: int) -> int:
    """The same pipe under a number that the launcher's own do not collide with."""
    number = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(end)
    return number
