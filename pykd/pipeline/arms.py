"""The students of a chain in every arm: each a training of its own, resumed and spread over devices by itself."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pykd.distillation.chain import link_name, make_link, train_link
from pykd.evaluation import evaluate, explanation_similarity, interleaved_latency
from pykd.io.files import atomic_write, sha256
from pykd.io.save import WEIGHTS, save_pretrained
from pykd.pipeline.details import details_of
from pykd.pipeline.directory import WORKERS, RunDirectory
from pykd.pipeline.result import Measured, Run
from pykd.pipeline.runner import TEACHER, Pipeline
from pykd.pipeline.stages import link_options, student_maker
from pykd.pipeline.workers import Part, carry_out
from pykd.recipe import Recipe, recipe_yaml
from pykd.recipe.schema import Chain
from pykd.recipe.studies import Study

logger = logging.getLogger("pykd.pipeline")


def is_chain(recipe: Recipe) -> bool:
    """Whether a recipe has nothing but a chain, whose students can be made one by one."""
    return [stage.kind for stage in recipe.stages] == ["chain"]


@dataclass(frozen=True)
class Arm:
    """One student trained in one way: "chain", "labels" or "direct"; by whom, None on labels alone."""

    student: str
    method: str
    guide: str | None

    @property
    def name(self) -> str:
        """Also that of its folder under ``stages/``."""
        return link_name(self.student, self.method)


def arms_of(chain: Chain) -> list[Arm]:
    """Every student by the chain and by each arm, in the order of the recipe; the first one's chain is its direct way.

    >>> from pykd.recipe.models import Student
    >>> [(arm.name, arm.guide) for arm in arms_of(Chain(students={"a": Student(depth=2), "b": Student(depth=1)}))]
    [('a-chain', 'teacher'), ('a-labels', None), ('b-chain', 'a-chain'), ('b-labels', None), ('b-direct', 'teacher')]
    """
    found, guide = [], "teacher"
    for student in chain.students:
        found.append(Arm(student, "chain", guide))
        others = {"labels": None, "direct": "teacher"}
        found += [Arm(student, arm, others[arm]) for arm in chain.arms if arm == "labels" or guide != "teacher"]
        guide = link_name(student, "chain")
    return found


def measured_of(recipe: Recipe, directory: RunDirectory) -> list[Measured]:
    """What a finished run has measured, in the order of the recipe, the teacher first."""
    names = [f"{number}-{stage.kind}" for number, stage in enumerate(recipe.stages, start=1)]
    settings = recipe.stages[0].settings
    if is_chain(recipe) and isinstance(settings, Chain):
        names = [arm.name for arm in arms_of(settings)]
    records = [directory.record(name) for name in (TEACHER, *names)]
    return [Measured.from_dict(record) for record in records if record is not None]


class StudyPipeline(Pipeline):
    """The teacher as in any run, then every student of every arm as a stage of its own."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, *, workers: int = 1, **options: Any) -> None:
        super().__init__(recipe, directory, **options)
        settings = recipe.stages[0].settings
        assert isinstance(settings, Chain)
        self.chain, self.workers = settings, workers

    def carry_out(self) -> Path:
        """Every arm; the folder of the last student that the chain made."""
        self.prepare()
        self.teach()
        arms = arms_of(self.chain)
        recipe = self.directory.path / WORKERS / "recipe.yaml"
        if self.workers > 1:
            atomic_write(recipe, recipe_yaml(self.recipe))
        carry_out([self._part(arm, recipe) for arm in arms], recipe.parent, workers=self.workers)
        self.measured += self.together.shared(lambda: measured_of(self.recipe, self.directory)[1:])
        return self.directory.model(link_name(list(self.chain.students)[-1], "chain"))

    def _part(self, arm: Arm, recipe: Path) -> Part:
        words = ("part", str(recipe), str(self.directory.path), "--teachers", str(self.cache), "--arm", arm.name)
        needs = () if arm.guide is None or arm.guide == "teacher" else (arm.guide,)
        done = functools.partial(self._recorded, arm.name)
        return Part(arm.name, words, functools.partial(self.make, arm), done, after=needs)

    def _recorded(self, name: str) -> bool:
        return self.together.shared(lambda: self.directory.record(name) is not None)

    def make_one(self, arm: Arm) -> None:
        """One arm alone, in a process that another one started for it."""
        self.prepare()
        self.teach()
        self.make(arm)

    def make(self, arm: Arm) -> None:
        """Train, save and measure one arm, unless it is finished."""
        if self._recorded(arm.name):
            logger.info("%s: finished before, skipped", arm.name)
            return
        began = time.perf_counter()
        context = self._context(arm.name, self.directory.checkpoints(arm.name))
        maker = student_maker(self.chain, arm.student, context)
        guide = None if arm.guide is None else self.teacher
        if arm.guide not in (None, "teacher"):
            guide = self.load(self.directory.model(str(arm.guide)))
        student = make_link(maker, self.teacher, seed=self.recipe.seed)
        model = train_link(student, guide, self.data, **link_options(self.chain, context))
        self.together.once(lambda: self._save_student(arm, model, time.perf_counter() - began))

    def _save_student(self, arm: Arm, model: nn.Module, seconds: float) -> None:
        """Save and measure one student of one arm; with that it is finished."""
        folder = self.directory.model(arm.name)
        provenance = self._provenance(arm.name)
        save_pretrained(model, folder, tokenizer=self.data.tokenizer, provenance=provenance, overwrite=True)
        report = evaluate(model, self.data, name=arm.name, path=folder, **self.measuring())
        models = {"teacher": self.teacher, "now": model}
        timed = interleaved_latency(models, self.data.example(), rounds=self.recipe.evaluate.speed_rounds)
        report = report.with_speedup(self.measured[0].report.name, timed.speedup("now"))
        trained = details_of(getattr(model, "pykd_report", ()))
        details: dict[str, Any] = {**trained, "stage": "study", "method": arm.method, "student": arm.student}
        explain = (self.recipe.study or Study()).explain
        if explain and self.data.task == "classification":
            similar = explanation_similarity(model, self.teacher, self.data, examples=explain)
            details["explanations"] = {"cosine": similar.cosine, "rank_correlation": similar.rank_correlation}
        entry = Measured(arm.name, report, seconds, sha256(folder / WEIGHTS), False, details)
        self.directory.finish(arm.name, entry.to_dict())
        logger.info("%s: %s, %.2f MB", arm.name, report.headline(), report.size_bytes / 1e6)

    def _result(self, *arguments: Any) -> Run:
        """Ratios are to the teacher: students were not made from one another."""
        return replace(super()._result(*arguments), chained=False)
