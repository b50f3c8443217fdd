"""One recipe from data to report: teacher, stages, measurements, and the proof that the result reloads."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pykd.data import DataBundle
from pykd.distillation.chain import link_name
from pykd.errors import ArtifactError, PykdError, RecipeError
from pykd.evaluation import evaluate, interleaved_latency
from pykd.io.files import sha256
from pykd.io.load import from_pretrained
from pykd.io.save import WEIGHTS, save_pretrained
from pykd.models.adapter import origin
from pykd.pipeline.details import curves_of, details_of
from pykd.pipeline.directory import EVENTS, RunDirectory
from pykd.pipeline.reload import Reload, check_reload
from pykd.pipeline.result import Finding, Measured, Run, progress_line
from pykd.pipeline.sources import build_data, build_model, build_student, teacher_key
from pykd.pipeline.stages import Context, apply_stage, train_options
from pykd.pipeline.tensor_bytes import tensor_bytes
from pykd.recipe import Recipe, recipe_hash
from pykd.recipe.schema import Stage
from pykd.recipe.train import Train
from pykd.training import finetune
from pykd.training.processes import Processes

logger = logging.getLogger("pykd.pipeline")

#: The teacher's name among the stages.
TEACHER = "0-teacher"


class Pipeline:
    """One run between two stages. Every stage starts from what the one before saved, interrupted or not.

    In several processes all train; the first alone does whatever else there is, and writes.
    """

    def __init__(
        self, recipe: Recipe, directory: RunDirectory, *, cache: Path, progress: bool | None, together: Processes
    ) -> None:
        self.recipe, self.directory, self.cache, self.together = recipe, directory, cache, together
        self.progress = progress if together.rank == 0 else False
        self.names = [f"{number}-{stage.kind}" for number, stage in enumerate(recipe.stages, start=1)]
        kinds = [stage.kind for stage in recipe.stages]
        self.labels = {TEACHER: "teacher"} | {
            name: kind if kinds.count(kind) == 1 else name for name, kind in zip(self.names, kinds, strict=True)
        }
        self.huggingface = "huggingface" in (recipe.teacher.source, recipe.student and recipe.student.source)
        self.measured: list[Measured] = []
        self.began = time.perf_counter()
        self.data: DataBundle
        self.teacher: nn.Module

    def execute(self, findings: Sequence[Finding] = ()) -> Run:
        """Do what is not done yet. KeyboardInterrupt passes through: finished stages stay finished."""
        saved = self.carry_out()
        return self.together.shared(lambda: self.conclude(saved, findings))

    def carry_out(self) -> Path:
        """Every stage; the folder of what the last one made."""
        self.prepare()
        saved = self.teach()
        for name, stage in zip(self.names, self.recipe.stages, strict=True):
            if not self._finished(name):
                self._stage(name, stage, saved)
            saved = self.directory.model(name)
        return saved

    def _finished(self, name: str) -> bool:
        """Whether a stage was finished before; its measurements are taken from then."""
        record = self.together.shared(lambda: self.directory.record(name))
        if record is not None:
            if name != TEACHER:
                logger.info("%s: finished before, skipped", name)
            self.measured.append(Measured.from_dict(record))
        return record is not None

    def prepare(self) -> None:
        """Read the data, and see that it is what the run began with."""
        logger.info("run %s (recipe %s) in %s", self.recipe.name, self.directory.hash, self.directory.path)
        self.data = build_data(self.recipe)
        self.together.once(lambda: self.directory.bind_data(self.data.fingerprint))
        sizes = len(self.data.train), len(self.data.test), len(self.data.class_names)
        logger.info("data %s: %d to train on, %d held out, %d classes", self.data.name, *sizes)

    def teach(self) -> Path:
        """The teacher's folder, made or found; with `train` in a cache that other runs share."""
        trained = self.recipe.teacher.train
        key = teacher_key(self.recipe, self.data)
        folder = self.cache / key if trained is not None else self.directory.model(TEACHER)
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            lock = alone(self.cache / f".{key}.lock", "teacher")
            self.together.once(lambda: stack.enter_context(lock))
            cached = self.together.shared(folder.exists)
            if not cached:
                self._make_teacher(folder)
        self.teacher = self.load(folder)
        if trained is not None:
            logger.info("teacher: %s (%s)", "cached, not trained again" if cached else "trained in this run", folder)
        if not self._finished(TEACHER):
            before = cached and trained is not None
            self.together.once(lambda: self._measure(TEACHER, self.teacher, folder, None, began, cached=before))
        return folder

    def _make_teacher(self, folder: Path) -> None:
        spec = self.recipe.teacher
        model = build_model(spec, self.recipe, self.data, key="teacher")
        if spec.train is not None:
            logger.info("teacher: training with %s", spec.train.model_dump(exclude_unset=True) or "the defaults")
            context = self._context("teacher", folder.with_name(f"{folder.name}.checkpoints"))
            finetune(model, self.data, **train_options(spec.train, context))

        def keep() -> None:
            save_pretrained(model, folder, tokenizer=self.data.tokenizer, provenance=self._provenance("teacher"))
            shutil.rmtree(folder.with_name(f"{folder.name}.checkpoints"), ignore_errors=True)

        self.together.once(keep)

    def _stage(self, name: str, stage: Stage, before: Path) -> None:
        began = time.perf_counter()
        logger.info("%s: %s", name, stage.settings.model_dump(exclude_unset=True) or "defaults")
        if isinstance(stage.settings, Train):
            model = self._changed(name, stage, before)
            self.together.once(lambda: self._keep(name, model, before, began))
        else:
            self.together.once(lambda: self._keep(name, self._changed(name, stage, before), before, began))

    def _changed(self, name: str, stage: Stage, before: Path) -> nn.Module:
        """The model that a stage makes of what the stage before saved."""
        first = name == self.names[0]
        model = build_student(self.recipe, self.teacher, self.data) if first and self.recipe.student else None
        context = self._context(name, self.directory.checkpoints(name))
        try:
            return apply_stage(stage, model if model is not None else self.load(before), context)
        except ValueError as error:
            if isinstance(error, PykdError):
                raise
            raise RecipeError(f"stages[{int(name.split('-')[0]) - 1}].{stage.kind}: {error}") from error

    def _keep(self, name: str, model: nn.Module, before: Path, began: float) -> None:
        """Save and measure what a stage has made."""
        folder = self.directory.model(name)
        provenance = self._provenance(name)
        save_pretrained(model, folder, tokenizer=self.data.tokenizer, provenance=provenance, overwrite=True)
        self._measure(name, model, folder, before, began)

    def _measure(
        self, name: str, model: nn.Module, folder: Path, source: Path | None, began: float, *, cached: bool = False
    ) -> None:
        """Quality, size and speed of one stage; with that the stage is finished."""
        seconds = time.perf_counter() - began
        report = evaluate(model, self.data, name=self.labels[name], path=folder, **self.measuring())
        before = None if source is None else self.load(source)
        if before is not None:
            models = {"teacher": self.teacher, "before": before, "now": model}
            timed = interleaved_latency(models, self.data.example(), rounds=self.recipe.evaluate.speed_rounds)
            previous = self.measured[-1].report
            report = report.with_speedup(previous.name, timed.speedup("now", baseline="before"))
            report = report.with_speedup(self.measured[0].report.name, timed.speedup("now"))
            logger.info("%s", progress_line(report, previous))
        else:
            logger.info("%s: %s, %.2f MB", report.name, report.headline(), report.size_bytes / 1e6)
        made_new = name == self.names[0] and (self.recipe.student is not None or name.endswith("-chain"))
        details = self._details(model, made_new, before)
        if source is not None and name.endswith("-prune") and not made_new:
            touched = tensor_bytes(source, folder, details.get("changed", ()))
            details["tensor_bytes"] = None if touched is None else touched._asdict()
        entry = Measured(
            stage=name, report=report, seconds=seconds, sha256=sha256(folder / WEIGHTS), cached=cached, details=details
        )
        self.measured.append(entry)
        self.directory.finish(name, entry.to_dict())

    def _details(self, model: nn.Module, made_new: bool, before: nn.Module | None) -> dict[str, Any]:
        """What a stage leaves of itself. before: the model that it began with; of a teacher the last record counts."""
        records = getattr(model, "pykd_report", ())
        taken = () if made_new else getattr(before, "pykd_report", ())
        details = details_of(records, len(records) - 1 if before is None else len(taken))
        if "links" in details:  # of a chain: every training of every arm, where there would be that of the last student
            names = [link_name(each["student"], each["arm"]) for each in details["links"]]
            details["curves"] = curves_of(self.directory.path / EVENTS, names)
            details.pop("curve", None)
        return details

    def measuring(self) -> dict[str, Any]:
        """How every model of the run is measured."""
        names = ("batch_size", "latency_rounds", "bertscore_model", "batch_sizes", "lengths")
        return {name: getattr(self.recipe.evaluate, name) for name in names}

    def conclude(self, saved: Path, findings: Sequence[Finding] = ()) -> Run:
        """The final model under `model/`, the reload in a new process, and the reports with what else was found."""
        state = self.directory.state
        if state["finished"]:
            logger.info("the run was finished before: nothing to do")
            done = self._result(Reload(**state["reload"]), state["seconds"])
            return replace(done, findings=tuple(findings))
        final = self.directory.path / "model"
        model = self.load(saved)
        save_pretrained(
            model, final, tokenizer=self.data.tokenizer, provenance=self._provenance("final"), overwrite=True
        )
        predictions = self.measured[-1].report.predictions
        reload = check_reload(
            final, self.directory.path / "recipe.yaml", predictions, batch_size=self.recipe.evaluate.batch_size
        )
        logger.log(logging.INFO if reload.identical else logging.ERROR, "%s", reload.sentence())
        run = replace(self._result(reload, time.perf_counter() - self.began), findings=tuple(findings))
        run.write(self.data)
        self.directory.save(finished=True, reload=vars(reload), seconds=run.seconds)
        return run

    def _result(self, reload: Reload, seconds: float) -> Run:
        return Run(
            recipe=self.recipe,
            directory=self.directory.path,
            measured=tuple(self.measured),
            reload=reload,
            seconds=seconds,
        )

    def load(self, folder: Path) -> nn.Module:
        """A saved stage, its checksums checked; the way out when the file is damaged."""
        try:
            with _without_bars() if self.huggingface else contextlib.nullcontext():
                return from_pretrained(folder)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error} Or delete {folder} and {folder}.json and run again with --resume, which makes it again."
            ) from error

    def _context(self, name: str, checkpoints: Path) -> Context:
        teacher = getattr(self, "teacher", None) or nn.Identity()
        return Context(
            recipe=self.recipe,
            data=self.data,
            teacher=teacher,
            checkpoints=checkpoints,
            progress=self.progress,
            name=name,
            log=self.directory.path / EVENTS,
        )

    def _provenance(self, stage: str) -> dict[str, Any]:
        known = self.measured[:1]  # the teacher's own folder is saved before it is measured
        teacher = {"teacher": {**origin(self.teacher), "sha256": known[0].sha256}} if known else {}
        return {
            "stage": stage,
            **teacher,
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "recipe_hash": recipe_hash(self.recipe),
            "data": self.data.describe(),
            "metrics": [entry.summary() for entry in self.measured],
        }


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for every load; between our own bars, for files that load at once, that is noise."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Wait until no other process makes the same thing, ``what``."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process makes it; waiting", what)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
