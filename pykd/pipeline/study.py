"""`pykd study`: several sizes trained in several ways, ranked by what the user values, one of them recommended."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pykd.errors import RecipeError
from pykd.evaluation import evaluate, explanation_similarity, interleaved_latency
from pykd.evaluation.comparison import table
from pykd.evaluation.report import Report
from pykd.io.files import sha256
from pykd.io.save import WEIGHTS, save_pretrained
from pykd.pipeline.directory import RANKING, held
from pykd.pipeline.result import Measured, Run
from pykd.pipeline.runner import Pipeline
from pykd.pipeline.stages import apply_chain
from pykd.recipe import RecipeLike, load_recipe
from pykd.recipe.schema import Chain, Study
from pykd.training.processes import Processes

logger = logging.getLogger("pykd.pipeline")

#: The stage that trains a study's students.
CHAIN = "1-chain"


@dataclass(frozen=True)
class Place:
    """One student in the ranking: its score, and its shares 0..1 of the best quality, speed, size and explanations."""

    name: str
    score: float
    shares: dict[str, float]


def rank(entries: Sequence[Measured], weights: Mapping[str, float]) -> list[Place]:
    """Students from best to worst: the weighted mean of what each has of the best one's quality, speed, smallness and
    likeness of explanations to the teacher (cosine, at least 0). Weights need not sum to 1; equal scores keep order.

    Raises RecipeError when all weights are zero, or one is for explanations that were not measured.
    """
    values: dict[str, list[float]] = {
        "quality": [entry.report.quality() for entry in entries],
        "speed": [_speed(entry.report) for entry in entries],
        "size": [1.0 / entry.report.size_bytes for entry in entries],
    }
    alike = [entry.details.get("explanations", {}).get("cosine") for entry in entries]
    if weights.get("explanations", 0) > 0:
        if None in alike:
            raise RecipeError("study.weights.explanations needs explanations: set study.explain above 0, or weigh it 0")
        values["explanations"] = [max(0.0, value) for value in alike]
    whole = sum(weights.get(name, 0) for name in values)
    if whole <= 0:
        raise RecipeError("study.weights: at least one weight must be above 0")
    shares = {name: [value / max(max(column), 1e-12) for value in column] for name, column in values.items()}
    places = [
        Place(
            entry.report.name,
            sum(weights.get(name, 0) * column[row] for name, column in shares.items()) / whole,
            {name: column[row] for name, column in shares.items()},
        )
        for row, entry in enumerate(entries)
    ]
    return sorted(places, key=lambda place: -place.score)


@dataclass(frozen=True)
class StudyRun:
    """A finished study: the run, whose final model is the recommended one, and the ranking."""

    run: Run
    ranking: tuple[Place, ...]
    weights: dict[str, float]

    def summary(self, *, width: int | None = None) -> str:
        """What the command line prints: the models beside the teacher, the ranking, the recommendation."""
        names = list(self.ranking[0].shares)
        rows = [["rank", "model", "score", *names]]
        for number, place in enumerate(self.ranking, start=1):
            shares = [f"{place.shares[name]:.3f}" for name in names]
            rows.append([str(number), place.name, f"{place.score:.4f}", *shares])
        return "\n\n".join([self.run.summary(width=width), table(rows, width=width), self.recommendation()])

    def recommendation(self) -> str:
        """The best under the weights, and by how much."""
        best, *others = self.ranking
        margin = f", {best.score - others[0].score:.4f} before {others[0].name}" if others else ""
        weighed = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items() if weight)
        return f"recommended: {best.name}, score {best.score:.4f}{margin} (weights: {weighed})"

    def to_dict(self) -> dict[str, Any]:
        """The content of study.json."""
        return {
            "recommended": self.ranking[0].name,
            "weights": self.weights,
            "ranking": [asdict(place) for place in self.ranking],
        }


def run_study(
    recipe: RecipeLike,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    short: bool = False,
    overrides: Sequence[str] = (),
    progress: bool | None = None,
) -> StudyRun:
    """Train the students of a recipe's ``chain`` stage in every arm, measure each, rank them, recommend one.

    The recipe has one stage, ``chain``, and may have a section ``study`` with the weights of the ranking. Each student
    of each arm is saved under ``stages/STUDENT-ARM``, the recommended one under ``model``; ``study.json`` has the
    ranking. Other arguments as for :func:`pykd.run`. Raises what run does, and RecipeError for another kind of recipe.
    """
    checked = load_recipe(recipe, overrides=overrides, short=short)
    if len(checked.stages) != 1 or not isinstance(checked.stages[0].settings, Chain):
        raise RecipeError(
            "a study compares the students of one `chain` stage: write stages: [chain: {students: {...}}], and run "
            "what comes after on the one that it recommends"
        )
    path = Path(output_dir) if output_dir is not None else Path("runs") / checked.name
    together = Processes()
    with held(path, checked, together, resume=resume, overwrite=overwrite) as directory:
        options: dict[str, Any] = {"cache": path.parent / "teachers", "progress": progress, "together": together}
        return _Study(checked, directory, **options).study()


class _Study(Pipeline):
    """The teacher as in any run, then every link and arm of the chain as a stage of its own."""

    def study(self) -> StudyRun:
        """Train what is not trained yet; then the first process ranks and concludes."""
        self.prepare()
        self._teacher()
        if not self.together.shared(lambda: bool(self.directory.state["finished"])):
            self._train()
        return self.together.shared(self._ranked)

    def _ranked(self) -> StudyRun:
        weights = (self.recipe.study or Study()).weights.model_dump()
        students = [Measured.from_dict(record) for record in self._records()]
        ranking = rank(students, weights)
        best = next(entry for entry in students if entry.report.name == ranking[0].name)
        self.measured = [self.measured[0], *(entry for entry in students if entry is not best), best]
        found = StudyRun(self._conclude(self.directory.model(best.stage)), tuple(ranking), weights)
        self.directory.write(RANKING, json.dumps(found.to_dict(), indent=2) + "\n")
        logger.info("%s", found.recommendation())
        return found

    def _train(self) -> None:
        stage = self.recipe.stages[0].settings
        context = self._context(CHAIN, self.directory.checkpoints(CHAIN))
        self._began = time.perf_counter()
        apply_chain(stage, context, keep=lambda *what: self.together.once(lambda: self._save_student(*what)))

    def _save_student(self, student: str, arm: str, model: nn.Module) -> None:
        """Save and measure one student of one arm; with that it is finished."""
        name = f"{student}-{arm}"
        if self.directory.record(name) is not None:
            return
        seconds = time.perf_counter() - self._began
        folder, options = self.directory.model(name), self.recipe.evaluate
        tokenizer = self.data.tokenizer
        save_pretrained(model, folder, tokenizer=tokenizer, provenance=self._provenance(name), overwrite=True)
        report = evaluate(
            model,
            self.data,
            name=name,
            batch_size=options.batch_size,
            latency_rounds=options.latency_rounds,
            batch_sizes=options.batch_sizes,
            lengths=options.lengths,
            path=folder,
        )
        models = {"teacher": self.teacher, "now": model}
        timed = interleaved_latency(models, self.data.example(), rounds=options.speed_rounds)
        report = report.with_speedup(self.measured[0].report.name, timed.speedup("now"))
        details: dict[str, Any] = {"stage": "study", "method": arm, "student": student}
        explain = (self.recipe.study or Study()).explain
        if explain and self.data.task == "classification":
            similar = explanation_similarity(model, self.teacher, self.data, examples=explain)
            details["explanations"] = {"cosine": similar.cosine, "rank_correlation": similar.rank_correlation}
        entry = Measured(name, report, seconds, sha256(folder / WEIGHTS), False, details)
        self.directory.finish(name, entry.to_dict())
        logger.info("%s: %s, %.2f MB", name, report.headline(), report.size_bytes / 1e6)
        self._began = time.perf_counter()

    def _records(self) -> list[dict[str, Any]]:
        """What is finished, in the order of the recipe: every student by the chain and by each arm."""
        stage = self.recipe.stages[0].settings
        assert isinstance(stage, Chain)
        names = [f"{student}-{arm}" for student in stage.students for arm in ("chain", *stage.arms)]
        return [record for name in names if (record := self.directory.record(name)) is not None]

    def _result(self, *arguments: Any) -> Run:
        """Ratios are to the teacher: students were not made from one another."""
        return replace(super()._result(*arguments), chained=False)


def _speed(report: Report) -> float:
    """How many times faster than the teacher, by alternating rounds."""
    return next(iter(report.speedup_over.values()), 1.0 / report.latency_p50_ms)
