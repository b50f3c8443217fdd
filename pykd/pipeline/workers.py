"""Parts of a study, one after another in this process, or several at a time in processes of their own.

A worker is `python -m pykd part ...` with one GPU to itself (``CUDA_VISIBLE_DEVICES``), or with its share of the cores.
The engine is the operating system: every part is one that could have been run alone, writes into its own folder and
continues there, so that what is made does not depend on how many workers there are, nor on when they are stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pykd.errors import PykdError
from pykd.training.processes import environment, launched

logger = logging.getLogger("pykd.pipeline")

#: Seconds between two looks at the workers.
PERIOD = 0.1
#: Seconds in which a worker may write its checkpoint after Ctrl-C; one that is killed goes on from an earlier one.
GRACE = 20.0


@dataclass(frozen=True)
class Part:
    """Something to make: by ``act`` in this process, or by `python -m pykd` with ``words`` in another.

    after: names of the parts that it needs. done: whether it is made already. may_fail: a part that cannot be made is
    left out with a warning.
    """

    name: str
    words: tuple[str, ...]
    act: Callable[[], object]
    done: Callable[[], bool]
    after: tuple[str, ...] = ()
    may_fail: bool = False


class PartError(PykdError, RuntimeError):
    """A worker ended without making its part."""


def carry_out(parts: Sequence[Part], folder: Path, *, workers: int = 1) -> None:
    """Make all parts, ``workers`` at a time; what they have to say is in ``folder``.

    Raises what a part raises, PartError with the last line of a worker that failed, and ValueError for workers inside
    the processes of a launcher. At the first error, and at Ctrl-C, the others are told to stop; they keep checkpoints.
    """
    check_workers(workers)
    if workers > 1:
        return _Workers(parts, folder, workers).run()
    for part in parts:
        try:
            part.act()
        except (PykdError, ValueError) as error:
            if not part.may_fail:
                raise
            logger.warning("%s: left out: %s", part.name, error)


def check_workers(workers: int) -> None:
    """Raise ValueError for a number of workers that cannot be."""
    if workers < 1 or (workers > 1 and launched()):
        raise ValueError(
            f"workers are processes of their own, one or more, and start without accelerate launch or torchrun; got "
            f"{workers}"
        )


class _Workers:
    """The parts that wait, run and are finished."""

    def __init__(self, parts: Sequence[Part], folder: Path, workers: int) -> None:
        self.waiting = [part for part in parts if not part.done()]
        self.finished = {part.name for part in parts if part.done()}
        self.folder, self.number = folder, len(self.waiting)
        self.running: dict[int, tuple[Part, subprocess.Popen[bytes]]] = {}
        self.slots = range(workers)

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            while self.waiting or self.running:
                self._start()
                time.sleep(PERIOD)
                for slot, (part, process) in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[slot]
                        self._ended(part, process.returncode)
        finally:
            self._stop()

    def _start(self) -> None:
        """Whatever may begin on a free device."""
        for slot in self.slots:
            ready = next((part for part in self.waiting if self.finished.issuperset(part.after)), None)
            if slot in self.running or ready is None:
                continue
            self.waiting.remove(ready)
            logger.info("%s: begins in a process of its own, see %s", ready.name, self._log(ready))
            with self._log(ready).open("ab") as log:
                command = [sys.executable, "-m", "pykd", *ready.words]
                process = subprocess.Popen(
                    command, env=device(slot, len(self.slots)), stdout=log, stderr=log, start_new_session=True
                )
            self.running[slot] = ready, process

    def _ended(self, part: Part, code: int) -> None:
        if code == 0:
            self.finished.add(part.name)
            logger.info("%s: made, %d to go", part.name, len(self.waiting) + len(self.running))
            return
        lines = self._log(part).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = f"its process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
        if not part.may_fail:
            raise PartError(f"{part.name}: {reason} (all it said is in {self._log(part)})")
        logger.warning("%s: left out, %s", part.name, reason)
        self.finished.add(part.name)

    def _stop(self) -> None:
        """End what still runs as Ctrl-C does, and what does not listen (jobs in the background) at once."""
        for _, process in self.running.values():
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE
        for _, process in self.running.values():
            try:
                process.wait(timeout=max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, part: Part) -> Path:
        return self.folder / f"{part.name}.log"


def device(slot: int, workers: int) -> dict[str, str]:
    """The environment of a worker: its GPU where there are some, else its share of the cores.

    >>> device(1, 2)["PYTHONUNBUFFERED"]
    '1'
    """
    found = environment() | {"PYTHONUNBUFFERED": "1"}
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        return found
    found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers)))
    return found
