"""Commands that measure and check saved models, and tell what this installation can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pykd.cli.console import columns, show
from pykd.cli.options import BatchSize, LatencyRounds, Library, ModelDir, NumbersFile, Offline, Recipe, Set


def evaluate(
    model: ModelDir,
    recipe: Recipe = None,
    settings: Set = None,
    batch_size: BatchSize = 64,
    latency_rounds: LatencyRounds = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; default: torch's own choice")] = None,
    output: NumbersFile = None,
    predictions: Annotated[Path | None, typer.Option(help="also write the predicted classes to this file")] = None,
) -> None:
    """Measure a saved model on the held-out data: quality, size, latency, throughput."""
    import torch

    from pykd.io.files import atomic_write
    from pykd.pipeline import evaluate_saved

    if threads is not None:
        torch.set_num_threads(threads)
    report = evaluate_saved(
        model, recipe=recipe, overrides=settings or (), batch_size=batch_size, latency_rounds=latency_rounds
    )
    found = report.to_dict()
    predicted = found.pop("predictions", None)
    typer.echo(json.dumps(found, indent=2))
    if output is not None:
        atomic_write(output, json.dumps(found, indent=2) + "\n")
    if predictions is not None:
        atomic_write(predictions, json.dumps({"predictions": predicted}) + "\n")


def compare(
    models: Annotated[list[Path], typer.Argument(help="saved models; the first is what the others are compared with")],
    recipe: Recipe = None,
    settings: Set = None,
    output: Annotated[Path | None, typer.Option(help="folder for report.html, report.json and report.md")] = None,
    explain: Annotated[
        int, typer.Option(min=0, help="compare the attributions of so many examples (integrated gradients)")
    ] = 0,
    batch_size: BatchSize = 64,
    latency_rounds: LatencyRounds = 50,
    speed_rounds: Annotated[int, typer.Option(min=1, help="alternating rounds, for the ratios")] = 20,
    batch_sizes: Annotated[list[int] | None, typer.Option("--rows", help="further batch sizes to time")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--tokens", help="further lengths to time")] = None,
) -> None:
    """Measure saved models on the same held-out data, beside each other: ratios, intervals, paired tests, behaviour."""
    from pykd.pipeline import compare_saved

    options: dict[str, Any] = {"batch_size": batch_size, "latency_rounds": latency_rounds, "speed_rounds": speed_rounds}
    options |= {"batch_sizes": batch_sizes or (), "lengths": lengths or (), "explain": explain, "output": output}
    found, explained = compare_saved(models, recipe=recipe, overrides=settings or (), **options)
    typer.echo(found.text(width=columns()) + "\n\n" + found.behaviour_text(width=columns()))
    for name, similar in explained.items():
        typer.echo(f"{name}: {similar.sentence()}")
    if output is not None:
        typer.echo(f"report: {output / 'report.html'}")


def safety(
    model: ModelDir,
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            metavar="[PRESET=]FILE[:harmful|:harmless]...",
            help="files or `datasets` names of prompts; presets: pint, jailbreakbench, notinject",
        ),
    ],
    harmful: Annotated[
        list[str] | None, typer.Option(help="class that stands for harm, by number or name; default 1")
    ] = None,
    threshold: Annotated[float, typer.Option(help="probability from which a prompt is stopped")] = 0.5,
    accuracy: Annotated[float | None, typer.Option(help="limit: at least this share; default 0.86")] = None,
    attacks: Annotated[float | None, typer.Option(help="limit: attacks that pass, below this; default 0.15")] = None,
    alarms: Annotated[float | None, typer.Option(help="limit: false alarms below this; default 0.10")] = None,
    text_column: Annotated[str | None, typer.Option(help="of files without a preset")] = None,
    label_column: Annotated[str | None, typer.Option(help="of files without a preset")] = None,
    harmful_label: Annotated[list[str] | None, typer.Option(help="values of it that mark harmful prompts")] = None,
    output: NumbersFile = None,
) -> None:
    """Put a text classifier before safety benchmarks; exit code 1 if it lets through or stops more than its limits."""
    from pykd.evaluation.tables import table
    from pykd.io.files import atomic_write
    from pykd.pipeline import safety_saved

    limits = {"accuracy": accuracy, "attack_success_rate": attacks, "false_positive_rate": alarms}
    found = safety_saved(
        model,
        benchmarks,
        harmful_classes=harmful or ("1",),
        threshold=threshold,
        limits={name: value for name, value in limits.items() if value is not None},
        text_column=text_column,
        label_column=label_column,
        harmful=harmful_label,
    )
    typer.echo("\n".join([table(found.cells(), width=columns()), "", *(found.failures or ("every limit is met",))]))
    if output is not None:
        atomic_write(output, json.dumps(found.to_dict(), indent=2) + "\n")
    if not found.passed:
        raise typer.Exit(1)


def verify(
    model: Annotated[str, typer.Argument(help="folder of a model, or distilbert, t5-small, mobilenet_v2, resnet18")],
    library: Library = None,
    offline: Offline = False,
) -> None:
    """Check a model: checksums, loading by its own library, one forward pass; report source, size and checksum."""
    from pykd.pipeline import verify as checked

    show(checked(model, library=library, offline=offline))


def info() -> None:
    """What this installation can run, and which kernel serves which operation."""
    from pykd.ops.dispatch import build_info

    found = build_info()
    table = found.pop("table")
    show(found)
    for row in table:
        typer.echo(f"  {row['op']:<14} {row['device']:<6} {row['when']:<44} {row['implementation']}")
