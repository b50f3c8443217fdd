"""Commands that carry out recipes, and watch what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pykd.cli.console import columns, rank
from pykd.cli.options import Overwrite, Resume, RunDir, Set, Short, Workers


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; ready ones are in recipes/")],
    output: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    short: Short = False,
    settings: Set = None,
    workers: Workers = 1,
) -> None:
    """Do what a recipe says: data, teacher, stages, report, and the saved model reloaded in a new process.

    On several devices: accelerate launch -m pykd run RECIPE, or torchrun --nproc-per-node N -m pykd run RECIPE.
    """
    from pykd.pipeline import run_chain

    identical = True
    for done in run_chain(
        recipe,
        output_dir=output,
        resume=resume,
        overwrite=overwrite,
        short=short,
        overrides=settings or (),
        workers=workers,
    ):
        if rank() == 0:
            typer.echo(f"\n{done.summary(width=columns())}\n")
        identical &= done.reload.identical
    if not identical:
        raise typer.Exit(1)


def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file with one stage, `chain`")],
    output: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    short: Short = False,
    settings: Set = None,
    workers: Workers = 1,
) -> None:
    """Train several sizes on labels alone, distilled and through the chain; rank them and recommend one.

    What the recipe names under `search` is looked for first; what it names under `ablate` is left out afterwards.
    """
    from pykd.pipeline import run_study

    done = run_study(
        recipe,
        output_dir=output,
        resume=resume,
        overwrite=overwrite,
        short=short,
        overrides=settings or (),
        workers=workers,
    )
    typer.echo(f"\n{done.summary(width=columns())}\n")
    if not done.run.reload.identical:
        raise typer.Exit(1)


def part(
    recipe: Annotated[Path, typer.Argument(help="recipe of the part, or of the study that it is an arm of")],
    folder: Annotated[Path, typer.Argument(help="where it goes")],
    teachers: Annotated[Path, typer.Option(help="folder of trained teachers")],
    arm: Annotated[str | None, typer.Option(help="the arm, as STUDENT-ARM")] = None,
) -> None:
    """Make one part of a study: what --workers starts on each device."""
    from pykd.pipeline.parts import do_part

    do_part(recipe, folder, teachers=teachers, arm=arm)


def monitor(
    run: Annotated[Path, typer.Argument(help="folder of a run or of a service, or its log; it may run elsewhere")],
    once: Annotated[bool, typer.Option("--once", help="show it as it is now and leave")] = False,
) -> None:
    """Watch a run's trainings (loss, validations, rate, time left) or a service's models (traffic, drift, alarms)."""
    from pykd.pipeline.monitor import watch

    watch(run, once=once)
