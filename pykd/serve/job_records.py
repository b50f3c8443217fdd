"""The records of jobs: one JSON file each, written whole, so that a service knows them after a restart."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import typing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pykd.io.files import atomic_write

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ID = re.compile(r"[0-9a-f]{16}")
Status = Literal["running", "stopping", "finished", "interrupted", "failed"]
#: A job in one of these has a process.
ACTIVE = ("running", "stopping")


@dataclass(frozen=True)
class Job:
    """One job. ``pid`` and ``pid_started`` (the kernel's clock ticks) name its process, the latter in case the number
    is given to another one. ``error`` is the sentence that a failed run ended with."""

    recipe: str
    file: str
    verb: str
    overrides: tuple[str, ...] = ()
    short: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    status: Status = "running"
    created: float = field(default_factory=time.time)
    ended: float | None = None
    pid: int | None = None
    pid_started: int | None = None
    exit_code: int | None = None
    error: str | None = None

    @property
    def active(self) -> bool:
        """Whether it has a process."""
        return self.status in ACTIVE

    def public(self) -> dict[str, Any]:
        """What a client is told: no paths of this machine."""
        hidden = ("file", "pid", "pid_started")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


class JobRecords:
    """``folder/ID.json`` of every job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> Job:
        """Store the job as it is now; returned as it came."""
        content = {"format_version": FORMAT_VERSION, **asdict(job)}
        atomic_write(self.folder / f"{job.id}.json", json.dumps(content, indent=2) + "\n")
        return job

    def remove(self, job: Job) -> None:
        """Forget a job."""
        (self.folder / f"{job.id}.json").unlink(missing_ok=True)

    def read(self) -> dict[str, Job]:
        """All jobs by id, oldest first; a record that cannot be read is left where it is and logged."""
        jobs = []
        for file in self.folder.glob("*.json"):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                if content.pop("format_version") != FORMAT_VERSION or not ID.fullmatch(content["id"]):
                    raise ValueError("another format")
                jobs.append(_sound(replace(Job(**content), overrides=tuple(content["overrides"])), file))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s is no record of a job that can be read (%s): passed over", file, error)
        return {job.id: job for job in sorted(jobs, key=lambda job: job.created)}


def _sound(job: Job, file: Path) -> Job:
    """The job, if its values are what a service writes: they name a file to delete and a process to signal."""
    if job.id != file.stem or job.status not in typing.get_args(Status) or not isinstance(job.created, int | float):
        raise ValueError("its id, status or time is none")
    if not all(number is None or (type(number) is int and number > 0) for number in (job.pid, job.pid_started)):
        raise ValueError("its process has no number")
    return job
