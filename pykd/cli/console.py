"""What the commands say: results on stdout, one sentence for an error and the log on stderr."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from typing import Any

import typer


def sentence(error: Exception) -> tuple[str, int]:
    """What is wrong, for whoever typed the command, and the exit code."""
    from pykd.errors import PykdError

    if hasattr(error, "format_message"):  # a usage error of click, which newer typers carry inside themselves
        return f"{error.format_message().rstrip('.')}; see pykd --help", 2
    if isinstance(error, PykdError | ValueError):
        return " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left for {error.filename or 'the output'}: make room, then continue with --resume", 2
    if isinstance(error, ImportError):
        return f"{error}: install what recipes need with `pip install 'pykd[all]'`", 2
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", 1


def say(text: str, code: int) -> int:
    """A sentence on stderr, with the process among several; the exit code that was given."""
    if text:
        process = f"process {rank()}: " if rank() else ""
        typer.echo(f"pykd: {process}{text}", err=True)
    return code


def rank() -> int:
    """Number of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def columns() -> int | None:
    """Width of the terminal; None where the output goes to a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(facts: dict[str, Any]) -> None:
    """Facts by name, a line each."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")


class _Console(logging.StreamHandler[Any]):
    """Messages on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def talk(level: int) -> None:
    """Send pykd's log messages to stderr, once."""
    package = logging.getLogger("pykd")
    handler = next((h for h in package.handlers if getattr(h, "pykd_console", False)), None)
    if handler is None:
        handler = _Console()
        handler.pykd_console = True  # type: ignore[attr-defined]
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        package.addHandler(handler)
        package.propagate = False
    handler.setLevel(level if rank() == 0 else logging.ERROR)
    package.setLevel(level)
