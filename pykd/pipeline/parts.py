"""Recipes inside a run: each trial of a search and each ablation is one, in a folder of its own, made once and kept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pykd.errors import RecipeError
from pykd.pipeline.arms import StudyPipeline, arms_of, is_chain, measured_of
from pykd.pipeline.directory import STATE, WORKERS, RunDirectory, held
from pykd.pipeline.result import Measured
from pykd.pipeline.runner import TEACHER, Pipeline, alone
from pykd.pipeline.workers import Part
from pykd.recipe import Recipe, load_recipe
from pykd.recipe.schema import Chain
from pykd.training.processes import Processes


def make(recipe: Recipe, folder: Path, *, teachers: Path, progress: bool | None, together: Processes) -> None:
    """All stages of a recipe, or all arms of a chain, measured; without a final model and reports of their own."""
    with held(folder, recipe, together, resume=(folder / STATE).exists(), overwrite=False) as directory:
        if together.shared(lambda: bool(directory.state["finished"])):
            return
        kind = StudyPipeline if is_chain(recipe) else Pipeline
        kind(recipe, directory, cache=teachers, progress=progress, together=together).carry_out()
        together.once(lambda: directory.save(finished=True))


def part_of(whole: Pipeline, name: str, recipe: Recipe, folder: Path, *, shared: int, may_fail: bool = False) -> Part:
    """A recipe to be made in ``folder``, which begins with the first stages of ``whole`` that it shares, if any.

    shared: as :class:`pykd.recipe.ablations.Variant` has it.
    """
    whole.together.once(lambda: _prepare(whole, recipe, folder, shared))
    options: dict[str, Any] = {"teachers": whole.cache, "progress": whole.progress, "together": whole.together}
    words = ("part", str(folder / "recipe.yaml"), str(folder), "--teachers", str(whole.cache))
    done = functools.partial(whole.together.shared, functools.partial(finished, recipe, folder))
    return Part(name, words, functools.partial(make, recipe, folder, **options), done, may_fail=may_fail)


def finished(recipe: Recipe, folder: Path) -> bool:
    """Whether a part is made."""
    return (folder / STATE).exists() and bool(RunDirectory.of_others(folder, recipe).state["finished"])


def results(recipe: Recipe, folder: Path) -> list[Measured]:
    """What a part has measured, the teacher first."""
    return measured_of(recipe, RunDirectory.of_others(folder, recipe))


def do_part(recipe: Path, folder: Path, *, teachers: Path, arm: str | None = None) -> None:
    """What a worker does: one arm of the study that the calling process holds in ``folder``, or all of a part.

    Raises RecipeError for an arm that the recipe does not have.
    """
    checked, together = load_recipe(recipe), Processes()
    if arm is None:
        with alone(folder.with_name(f".{folder.name}.lock"), folder.name):
            make(checked, folder, teachers=teachers, progress=False, together=together)
        return
    settings = checked.stages[0].settings
    known = {each.name: each for each in arms_of(settings)} if isinstance(settings, Chain) else {}
    if arm not in known:
        raise RecipeError(f"{recipe} has no arm {arm!r}; it has {', '.join(known) or 'none'}")
    with alone(folder / WORKERS / f".{arm}.lock", arm):
        directory = RunDirectory.of_others(folder, checked)
        pipeline = StudyPipeline(checked, directory, cache=teachers, progress=False, together=together)
        pipeline.make_one(known[arm])


def _prepare(whole: Pipeline, recipe: Recipe, folder: Path, shared: int) -> None:
    if (folder / STATE).exists():
        return
    with RunDirectory.open(folder, recipe, resume=False, overwrite=False) as directory:
        directory.take(whole.directory, [TEACHER, *whole.names][: shared + 1])
