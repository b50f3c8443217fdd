"""The process of a job: started, told apart from a later one of its number, signalled and ended with its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: Runs give way to the service's own answers.
NICENESS = 10
#: A process of the background may have inherited that Ctrl-C is ignored: a run must hear it, to leave a checkpoint.
PROGRAM = (
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    f"os.nice({NICENESS})\n"
    "from pykd.cli import main\n"
    "sys.exit(main())\n"
)
#: What stands before the words of ``pykd run``.
PYKD = (sys.executable, "-c", PROGRAM)
#: Variables of the service that are none of a job's business.
SECRETS = ("PYKD_TOKEN",)
#: Exit codes of a run that was stopped, after Ctrl-C or a signal.
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM)


def start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, what it prints at the end of a file. Raises OSError."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    with open(output, "ab") as printed:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def began(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def alive(pid: int | None, when: int | None) -> bool:
    """Whether the process of this number is still the one that began then."""
    return pid is not None and began(pid) == when is not None


def send(pid: int | None, when: int | None, number: int) -> None:
    """A signal to a process and those that it has started, if it is still the one that began then."""
    if pid is not None and alive(pid, when):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def end_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process when it has ended, and nothing of its group is left.

    The processes of a run that was killed do not notice. Its number belongs to it until it is waited for, so that the
    signal before that reaches nobody else.
    """
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
