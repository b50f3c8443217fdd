"""A log of JSON lines that rotates: whole lines only, also after a kill or a full disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)


class RotatingLog(RotatingFileHandler):
    """Appends one JSON object a line to ``path``; at ``max_bytes`` the file becomes ``path.1``, ``path.1`` becomes
    ``path.2``, and ``backups`` of them are kept.

    A line goes out in one piece. Half a line that a crash or a full disk left is ended before the next one, and
    :func:`read_log` passes over it. What cannot be written is said once and lost; the service goes on.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = RotatingLog(Path(folder.name, "service.jsonl"))
    >>> log.append("start", models=["a"])
    >>> log.close()
    >>> [line["event"] for line in read_log(Path(folder.name, "service.jsonl"))]
    ['start']
    >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 10_000_000, backups: int = 4) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._silent = False
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="utf-8", delay=True)

    def append(self, event: str, **values: Any) -> None:
        """Write one event with the time, in seconds since 1970."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, ensure_ascii=True)
        self.handle(logging.LogRecord("pykd.service", logging.INFO, self.baseFilename, 0, line, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        """Rotate where it is due, and write the line by a single call of the system."""
        try:
            line = record.getMessage()
            if self.shouldRollover(record):
                self.doRollover()
            if self.stream is None:
                self.stream = self._open()
            data = f"{line}{self.terminator}".encode()
            written = os.write(self.stream.fileno(), data)
            if written < len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
            self._silent = False
        except OSError:
            self.handleError(record)

    def _open(self) -> Any:
        torn = _ends_inside_a_line(self.baseFilename)
        stream = super()._open()
        if torn:
            os.write(stream.fileno(), b"\n")
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Say once that lines are lost; the next one finds the file opened again."""
        if not self._silent:
            self._silent = True
            logger.warning("%s cannot be written: lines are lost until it can", self.baseFilename, exc_info=True)
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """Every whole event of a log and of the files it was rotated into, oldest first; torn lines are passed over."""
    with opened(Path(path)) as files:
        for line in itertools.chain.from_iterable(files):
            event = parse(line)
            if event is not None:
                yield event


def rotated(path: Path) -> list[Path]:
    """The files of a log that exist, oldest first."""
    numbered = {
        int(file.name.rpartition(".")[2]): file
        for file in path.parent.glob(f"{path.name}.*")
        if file.name.rpartition(".")[2].isdecimal()
    }
    return [*(numbered[number] for number in sorted(numbered, reverse=True)), *([path] if path.exists() else [])]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Sequence[BinaryIO]]:
    """The files of a log, oldest first, as they all were at one moment, however the log rotates meanwhile."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                files = [stack.enter_context(open(file, "rb")) for file in rotated(path)]
                names = [os.stat(file).st_ino for file in rotated(path)]
            except FileNotFoundError:  # renamed since it was listed
                continue
            if names == [os.fstat(file.fileno()).st_ino for file in files]:
                yield files
                return


def parse(line: bytes) -> dict[str, Any] | None:
    """A line as an event; None for one that is torn or something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event and "time" in event else None


def _ends_inside_a_line(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            if not file.tell():
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
