"""The verb `run`: a recipe, and the recipes that it names to come after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pykd.errors import RecipeError
from pykd.pipeline.ablation import ablated
from pykd.pipeline.directory import STATE, RunDirectory, held
from pykd.pipeline.result import Run
from pykd.pipeline.runner import Pipeline
from pykd.pipeline.workers import check_workers
from pykd.recipe import Recipe, RecipeLike, load_recipe
from pykd.recipe.ablations import variants
from pykd.training.processes import Processes


def run(
    recipe: RecipeLike,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    short: bool = False,
    overrides: Sequence[str] = (),
    progress: bool | None = None,
    workers: int = 1,
) -> Run:
    """Carry out a recipe: train or load the teacher, run the stages, measure each, save, report, reload and compare.

    recipe: YAML file, mapping, or Recipe. output_dir: default ``runs/<name>``; holds ``stages/``, ``model/``,
    ``report.json``, ``report.html``, ``report.md`` and ``run.log``; a recipe named by ``then`` gets a folder inside.
    Teachers that are trained in a run are kept beside it in ``teachers/`` and used again by runs with the same data and
    settings. resume: skip what is finished and continue what was interrupted; on a CPU the result is the same to the
    bit. overwrite: replace the run that is in that folder. short: apply the recipe's own ``short`` settings. overrides:
    ``key=value`` for the recipe. progress: bars on stderr; None shows them on a terminal only. workers: how many
    runs without one of the components under ``ablate`` are made at a time, each in a process of its own. In the
    processes of ``accelerate launch`` or torchrun the run is one run on all: all train, the first does the rest.

    Returns the finished Run. Raises RecipeError, DataError, ModelLoadError or ArtifactError, each with one sentence.

    >>> done = run("recipes/digits.yaml")  # doctest: +SKIP
    >>> done.final.accuracy, done.reload.identical  # doctest: +SKIP
    """
    runs = list(
        run_chain(
            recipe, output_dir=output_dir, resume=resume, overwrite=overwrite, short=short, overrides=overrides,
            progress=progress, workers=workers,
        )
    )  # fmt: skip
    result = runs.pop()
    while runs:
        result = runs.pop().followed_by(result)
    return result


def run_chain(
    recipe: RecipeLike,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    short: bool = False,
    overrides: Sequence[str] = (),
    progress: bool | None = None,
    workers: int = 1,
) -> Iterator[Run]:
    """Like :func:`run`, but yields each run of the chain when it is finished. All recipes are checked first."""
    if resume and overwrite:
        raise RecipeError("--resume continues a run and --overwrite starts it over: give one of them")
    check_workers(workers)
    recipes = _recipes(recipe, overrides=overrides, short=short)
    for each in recipes:
        variants(each)
    path = Path(output_dir) if output_dir is not None else Path("runs") / recipes[0].name
    folders = [path, *(path / each.name for each in recipes[1:])]
    together = Processes()

    def check() -> list[bool]:
        again = [resume, *(resume and (folder / STATE).exists() for folder in folders[1:])]
        for each, folder, continued in zip(recipes, folders, again, strict=True):
            RunDirectory(folder, each).check(resume=continued, overwrite=overwrite)
        return again

    for each, folder, continued in zip(recipes, folders, together.shared(check), strict=True):
        with held(folder, each, together, resume=continued, overwrite=overwrite) as directory:
            pipeline = Pipeline(each, directory, cache=path.parent / "teachers", progress=progress, together=together)
            yield ablated(pipeline.execute(), pipeline, workers=workers)


def _recipes(first: RecipeLike, *, overrides: Sequence[str], short: bool) -> list[Recipe]:
    """The chain of recipes that follow each other; RecipeError for one that cannot be read or that comes twice."""
    recipes = [load_recipe(first, overrides=overrides, short=short)]
    folder = Path(first).parent if isinstance(first, (str, Path)) else Path()
    while recipes[-1].then is not None:
        file = folder / recipes[-1].then
        recipes.append(load_recipe(file, short=short))
        folder = file.parent
        if len({each.name for each in recipes}) < len(recipes):
            raise RecipeError(f"then: {file} leads back to the recipe {recipes[-1].name!r}; a chain must end")
    return recipes
