"""`pykd study`: several sizes trained in several ways, ranked by what the user values, one of them recommended."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pykd.errors import RecipeError
from pykd.pipeline.ablation import ablated
from pykd.pipeline.arms import StudyPipeline, is_chain
from pykd.pipeline.directory import RANKING, RunDirectory, held
from pykd.pipeline.ranking import Place, gains_of, rank, ranking_of
from pykd.pipeline.result import Finding, Run
from pykd.pipeline.runner import Pipeline
from pykd.pipeline.tuning import tuned
from pykd.pipeline.workers import check_workers
from pykd.recipe import RecipeLike, load_recipe
from pykd.recipe.ablations import variants
from pykd.recipe.studies import Study
from pykd.training.processes import Processes

logger = logging.getLogger("pykd.pipeline")


@dataclass(frozen=True)
class StudyRun:
    """A finished study: the run, whose final model is the recommended one, and the ranking, empty without a chain."""

    run: Run
    ranking: tuple[Place, ...]
    weights: dict[str, float]

    def summary(self, *, width: int | None = None) -> str:
        """What the command line prints: the models beside the teacher, the tables, the recommendation."""
        return "\n\n".join([self.run.summary(width=width), *([self.recommendation()] if self.ranking else [])])

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
    workers: int = 1,
) -> StudyRun:
    """Search what the recipe's ``search`` names; then train the students of its stage ``chain`` in every arm, measure
    each, rank them and recommend one; then leave out what ``ablate`` names, one component at a time.

    The recipe has a single stage, ``chain``, or a ``search``, after which the recipe is carried out with the best
    values as by :func:`pykd.run`. ``study`` has the weights of the ranking. Each student of each arm is saved under
    ``stages/STUDENT-ARM``, the recommended one under ``model``; ``study.json`` has the ranking. With other weights
    ``resume`` ranks again what is there. workers: arms, trials and ablations made at a time, each in a process and on a
    device of its own. Other arguments as for run. Raises what run does, and RecipeError for a recipe with neither.
    """
    check_workers(workers)
    checked = load_recipe(recipe, overrides=overrides, short=short)
    if not is_chain(checked) and checked.search is None:
        raise RecipeError(
            "a study compares the students of one `chain` stage: write stages: [chain: {students: {...}}], and run "
            "what comes after on the one that it recommends; or give it values to `search`"
        )
    variants(checked)
    path = Path(output_dir) if output_dir is not None else Path("runs") / checked.name
    together = Processes()
    with held(path, checked, together, resume=resume, overwrite=overwrite) as directory:
        options: dict[str, Any] = {"cache": path.parent / "teachers", "progress": progress, "together": together}
        found: tuple[Finding, ...] = ()
        if checked.search is not None:
            checked, searched = tuned(checked, directory, workers=workers, **options)
            found = (searched,)
        if not is_chain(checked):
            pipeline = Pipeline(checked, directory, **options)
            done = StudyRun(pipeline.execute(found), (), {})
        else:
            pipeline = StudyPipeline(checked, directory, workers=workers, **options)
            pipeline.carry_out()
            done = together.shared(functools.partial(_ranked, pipeline, found))
        return replace(done, run=ablated(done.run, pipeline, workers=workers))


def _ranked(pipeline: StudyPipeline, found: Sequence[Finding]) -> StudyRun:
    """The ranking, and the best student as the final model of the run."""
    weights = (pipeline.recipe.study or Study()).weights.model_dump()
    teacher, *students = pipeline.measured
    ranking = rank(students, weights)
    best = next(entry for entry in students if entry.report.name == ranking[0].name)
    pipeline.measured = [teacher, *(entry for entry in students if entry is not best), best]
    gains = gains_of(students)
    tables = (*found, *([gains] if gains is not None else []), ranking_of(ranking))
    if pipeline.directory.state["finished"] and _weighed(pipeline.directory) != weights:
        logger.info("the weights are others now: ranked again")
        pipeline.directory.save(finished=False)
    done = StudyRun(pipeline.conclude(pipeline.directory.model(best.stage), tables), tuple(ranking), weights)
    pipeline.directory.write(RANKING, json.dumps(done.to_dict(), indent=2) + "\n")
    logger.info("%s", done.recommendation())
    return done


def _weighed(directory: RunDirectory) -> dict[str, float] | None:
    """The weights of the ranking that was written before."""
    file = directory.path / RANKING
    return json.loads(file.read_text(encoding="utf-8"))["weights"] if file.exists() else None
