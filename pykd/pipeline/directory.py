"""The folder of one run: which recipe it belongs to, which stages are finished, and its log."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError, RecipeError
from pykd.io.files import atomic_write
from pykd.recipe import Recipe, recipe_hash, recipe_yaml
from pykd.training.processes import Processes

logger = logging.getLogger("pykd.pipeline")

FORMAT_VERSION = 1

#: What a run's folder says of itself, and the log of its trainings.
STATE, EVENTS = "run.json", "events.jsonl"
#: Where a study writes its ranking.
RANKING = "study.json"
#: Folders of the runs without one component, of the trials of a search, and of what processes of their own have to say.
ABLATIONS, SEARCH, WORKERS = "ablations", "search", "workers"
#: What a run writes, and so what starting over may delete.
OWN = (
    "stages",
    "checkpoints",
    "model",
    "report.json",
    "report.html",
    "report.md",
    "recipe.yaml",
    "run.log",
    EVENTS,
    RANKING,
    ABLATIONS,
    SEARCH,
    WORKERS,
)


class RunDirectory:
    """A folder that holds exactly one run: ``run.json`` names its recipe, ``stages/`` its results.

    A stage is finished when ``stages/<name>.json`` exists: it is written last, after the stage's model folder, and
    both appear whole or not at all.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.hash = recipe_hash(recipe)
        self.state: dict[str, Any] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
        """Hold the folder for this recipe, new, continued (``resume``) or started over (``overwrite``), while inside.

        What is logged meanwhile is added to ``run.log``, with time stamps. Raises RecipeError when the folder holds a
        run, with ``resume`` another one or none; ArtifactError when another process holds it.
        """
        directory = cls(path, recipe)
        directory.check(resume=resume, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the folder {path}: {error.strerror}; choose another --output") from None
        with _locked(path):
            found = directory.check(resume=resume, overwrite=overwrite)
            if found is not None and resume:
                directory.state = found
                directory._take_recipe()
            else:
                directory._begin(replace=found is not None)
            with _logged(path / "run.log"):
                yield directory

    def check(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The state of the run in the folder, None for a new folder; errors as :meth:`open`, and nothing is changed."""
        if overwrite and (self.path / STATE).exists():
            return {}
        found = self._read()
        if found is None:
            self._refuse_foreign(resume)
            return None
        if found["recipe_hash"] != self.hash:
            raise RecipeError(
                f"{self.path} holds another run ({found['name']!r}, recipe {found['recipe_hash']}; this one is "
                f"{self.hash}): choose another folder with --output, or replace that run with --overwrite"
            )
        if not resume:
            kind, way = ("a finished", "read it again") if found["finished"] else ("an unfinished", "continue it")
            raise RecipeError(
                f"{self.path} holds {kind} run of this recipe: {way} with --resume, or start over with --overwrite"
            )
        return found

    @classmethod
    def of_others(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """The folder of a run that the calling process holds, for a process that it started."""
        directory = cls(path, recipe)
        directory.state = directory._read() or {}
        return directory

    def take(self, other: RunDirectory, stages: Sequence[str]) -> None:
        """Copy stages that another run has finished, where this one would do the very same."""
        for stage in stages:
            record = other.record(stage)
            if record is None or self.record(stage) is not None:
                continue
            if other.model(stage).exists():
                shutil.copytree(other.model(stage), self.model(stage), dirs_exist_ok=True)
            self.finish(stage, record)

    def _begin(self, *, replace: bool) -> None:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.save(recipe_hash=self.hash, name=self.recipe.name, finished=False, started=started)
        if replace:
            logger.info("%s: replacing the run that is there", self.path)
            self._clear()
        self.write("recipe.yaml", recipe_yaml(self.recipe))

    def _take_recipe(self) -> None:
        """The recipe as it is now: what its hash leaves out may have changed."""
        file, text = self.path / "recipe.yaml", recipe_yaml(self.recipe)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            self.write("recipe.yaml", text)

    def _read(self) -> dict[str, Any] | None:
        file = self.path / STATE
        if not file.exists():
            return None
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            state["recipe_hash"], state["name"], state["finished"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file} cannot be read ({error}): replace that run with --overwrite") from None
        if state.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{file} has format_version {state.get('format_version')}, this pykd reads {FORMAT_VERSION}: choose "
                "another folder with --output"
            )
        return dict(state)

    def _refuse_foreign(self, resume: bool) -> None:
        if resume:
            raise RecipeError(f"--resume: there is no run in {self.path}; leave --resume out to start one there")
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "is not empty and holds no run of pykd" if self.path.is_dir() else "is a file"
            raise RecipeError(f"{self.path} {what}: choose a new folder with --output")

    def _clear(self) -> None:
        """Delete what a run has written, and nothing else."""
        for name in OWN:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run, whole or not at all."""
        atomic_write(self.path / name, text)

    def save(self, **state: Any) -> None:
        """Change the run's state in memory and on disk."""
        self.state = {"format_version": FORMAT_VERSION, **self.state, **state}
        self.write(STATE, json.dumps(self.state, indent=2))

    def bind_data(self, fingerprint: str) -> None:
        """Refuse to continue on other data than the run began with."""
        known = self.state.get("data")
        if known is None:
            self.save(data=fingerprint)
        elif known != fingerprint:
            raise RecipeError(
                f"the data is not what the run in {self.path} began with (fingerprint {known}, now {fingerprint}): "
                "restore it, or start over with --overwrite"
            )

    def model(self, stage: str) -> Path:
        """Folder of a stage's saved model."""
        return self.path / "stages" / stage

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's training checkpoints, gone once the stage is finished."""
        return self.path / "checkpoints" / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote; None when it is not finished."""
        file = self.path / "stages" / f"{stage}.json"
        if not file.exists():
            return None
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{file} cannot be read ({error}): delete it, and --resume runs the stage again"
            ) from None

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Mark a stage as finished and drop its checkpoints."""
        self.write(f"stages/{stage}.json", json.dumps(record, indent=2, allow_nan=False))
        shutil.rmtree(self.checkpoints(stage), ignore_errors=True)


@contextlib.contextmanager
def held(path: Path, recipe: Recipe, together: Processes, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """The folder of a run in several processes: the first one holds it for all."""
    opened = RunDirectory.open(path, recipe, resume=resume, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        yield together.once(functools.partial(stack.enter_context, opened)) or RunDirectory(path, recipe)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the lock goes with the process, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(f"{path} is in use by another process: wait for it, or choose another --output") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _logged(file: Path) -> Iterator[None]:
    package = logging.getLogger("pykd")
    handler = _LogFile(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(level, logging.INFO) if level else logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk silences: the run's own writes report the disk, with one sentence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        logging.getLogger("pykd").removeHandler(self)
