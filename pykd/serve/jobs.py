"""Recipes carried out for a service, each in a process of its own: what kills a run does not reach the service."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pykd.errors import PykdError
from pykd.pipeline.directory import STATE
from pykd.serve import processes
from pykd.serve.allowed import AllowedRecipes
from pykd.serve.job_records import Job, JobRecords
from pykd.serve.progress import tail

logger = logging.getLogger(__name__)

#: Seconds from one look at a process that another service started to the next.
POLL_S = 0.5


class TooManyJobsError(PykdError):
    """As many jobs run as are allowed."""


class UnknownJobError(PykdError, LookupError):
    """No job has this id."""


class JobStateError(PykdError):
    """The job is not in a state in which this can be done."""


class Jobs:
    """Starts, stops, resumes and remembers the jobs of a service.

    folder: ``jobs/ID.json`` are the records, ``runs/ID`` the runs, ``jobs/ID.log`` what they printed. limit: jobs that
    run at once. grace_s: how long a stopped run has for its checkpoint before it is killed. program: what is started,
    before the words of ``pykd run``.
    """

    def __init__(
        self,
        folder: str | Path,
        recipes: AllowedRecipes,
        *,
        limit: int = 1,
        grace_s: float = 30.0,
        program: Sequence[str] = processes.PYKD,
    ) -> None:
        self.folder, self.recipes, self.limit, self.grace_s = Path(folder).resolve(), recipes, limit, grace_s
        self._program, self._lock = tuple(program), threading.RLock()
        self._records = JobRecords(self.folder / "jobs")
        self._threads: dict[str, threading.Thread] = {}
        self._jobs = self._records.read()
        for job in list(self._jobs.values()):
            if job.active:
                self._watch(job, None)

    def start(self, recipe: str, changes: Mapping[str, Any], *, short: bool = False) -> Job:
        """Start a recipe of the allowed folder. Raises RecipeError, or TooManyJobsError."""
        order = self.recipes.order(recipe, changes, short=short)
        with self._lock:
            self._room()
            job = Job(recipe, str(order.file), order.verb, order.overrides, short)
            return self._launch(job, resume=False)

    def resume(self, id: str) -> Job:
        """Continue an interrupted or failed job where it was. Raises as start, and JobStateError for other jobs."""
        with self._lock:
            job = self.get(id)
            if job.status not in ("interrupted", "failed"):
                raise JobStateError(f"job {id} is {job.status}: only interrupted and failed jobs are resumed")
            self._room()
            fresh = replace(job, status="running", ended=None, exit_code=None, error=None)
            return self._launch(fresh, resume=(self.run(id) / STATE).exists())

    def stop(self, id: str) -> Job:
        """Ctrl-C for the run, so that it leaves a checkpoint; after ``grace_s`` it is killed. Ended jobs stay as is."""
        with self._lock:
            job = self.get(id)
            if job.status == "running":
                job = self._keep(replace(job, status="stopping"))
                processes.send(job.pid, job.pid_started, signal.SIGINT)
                timer = threading.Timer(self.grace_s, self._kill, (id, job.pid))
                timer.daemon = True
                timer.start()
            return job

    def remove(self, id: str) -> None:
        """Delete the record and the files of a job that has ended. Raises JobStateError for one that runs."""
        with self._lock:
            job = self.get(id)
            if job.active:
                raise JobStateError(f"job {id} is {job.status}: stop it before it is removed")
            shutil.rmtree(self.run(id), ignore_errors=True)
            self.output(id).unlink(missing_ok=True)
            self._records.remove(job)
            del self._jobs[id]
            self._threads.pop(id, None)

    def get(self, id: str) -> Job:
        """A job as it is now. Raises UnknownJobError."""
        with self._lock:
            if id not in self._jobs:
                raise UnknownJobError(f"there is no job {id!a}; GET /jobs lists them")
            return self._jobs[id]

    def list(self) -> list[Job]:
        """All jobs, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def run(self, id: str) -> Path:
        """Folder of the run of a job that exists."""
        return self.folder / "runs" / id

    def output(self, id: str) -> Path:
        """What the processes of a job printed."""
        return self.folder / "jobs" / f"{id}.log"

    def close(self) -> None:
        """Stop all jobs, for their checkpoints; kill what takes longer than ``grace_s``."""
        for job in self.list():
            if job.active:
                self.stop(job.id)
        end = time.monotonic() + self.grace_s
        for id, thread in list(self._threads.items()):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self._kill(id, self.get(id).pid)
                thread.join(POLL_S * 4)

    def wait(self, id: str, timeout_s: float | None = None) -> Job:
        """The job when its process has ended, or after the time."""
        thread = self._threads.get(id)
        if thread is not None:
            thread.join(timeout_s)
        return self.get(id)

    def _room(self) -> None:
        running = sum(job.active for job in self._jobs.values())
        if running >= self.limit:
            raise TooManyJobsError(f"{running} of {self.limit} jobs run: wait for one to end, or stop it")

    def _launch(self, job: Job, *, resume: bool) -> Job:
        words = [job.verb, job.file, "--output", str(self.run(job.id))]
        words += ["--resume"] if resume else []
        words += ["--short"] if job.short else []
        words += [word for override in job.overrides for word in ("--set", override)]
        self.run(job.id).parent.mkdir(parents=True, exist_ok=True)
        self._records.write(job)  # a full disk is met before there is a process, or a job that would take a place
        try:
            process = processes.start([*self._program, *words], self.output(job.id))
        except OSError as error:
            self._keep(replace(job, status="failed", ended=time.time(), error=f"it could not be started: {error}"))
            raise
        job = self._keep(replace(job, pid=process.pid, pid_started=processes.began(process.pid)))
        logger.info("job %s: %s (%s) as process %d", job.id, job.recipe, "resumed" if resume else "new", process.pid)
        self._watch(job, process)
        return job

    def _keep(self, job: Job) -> Job:
        """Know the job as it is now. A disk that takes no record of it must keep nobody from stopping it."""
        self._jobs[job.id] = job
        try:
            self._records.write(job)
        except PykdError as error:
            logger.warning("job %s is %s, but its record is an old one: %s", job.id, job.status, error)
        return job

    def _watch(self, job: Job, process: subprocess.Popen[bytes] | None) -> None:
        thread = threading.Thread(target=self._wait, args=(job, process), name=f"pykd-job-{job.id}", daemon=True)
        self._threads[job.id] = thread
        thread.start()

    def _wait(self, job: Job, process: subprocess.Popen[bytes] | None) -> None:
        """Until the process ends; one that an earlier service started is no child of this one and is polled."""
        code: int | None
        if process is not None:
            code = processes.end_of(process)
        else:
            while processes.alive(job.pid, job.pid_started):
                time.sleep(POLL_S)
            code = 0 if self._run_finished(job.id) else None
        with self._lock:
            done = replace(self._jobs[job.id], ended=time.time(), exit_code=code, pid=None, pid_started=None)
            if code == 0:
                done = replace(done, status="finished")
            elif code is None or code in processes.INTERRUPTED:
                done = replace(done, status="interrupted")
            else:
                done = replace(done, status="failed", error=self._last_line(job.id))
            self._keep(done)
        logger.info("job %s: %s%s", job.id, done.status, f" ({done.error})" if done.error else "")

    def _run_finished(self, id: str) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return bool(json.loads((self.run(id) / STATE).read_text(encoding="utf-8"))["finished"])
        return False

    def _last_line(self, id: str) -> str:
        lines = tail(self.output(id))
        return next(
            (line for line in reversed(lines) if line.startswith("pykd: ")), lines[-1] if lines else "no message"
        )

    def _kill(self, id: str, pid: int | None) -> None:
        with self._lock:
            job = self._jobs.get(id)
            if job is not None and job.active and job.pid == pid:
                processes.send(job.pid, job.pid_started, signal.SIGKILL)
