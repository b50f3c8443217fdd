"""Commands of the HTTP service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pykd.cli.console import show
from pykd.cli.options import Library, ModelDir, Offline, Recipe, Set


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[[NAME=]MODEL]...", help="folders that pykd saved, or local Hugging Face folders"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; any but loopback demands a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="PYKD_TOKEN", help="what clients send as Authorization: Bearer TOKEN")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="folder below which requests may name models; may be repeated")
    ] = None,
    library: Library = None,
    offline: Offline = False,
    threads: Annotated[int | None, typer.Option(help="threads that compute; default: torch's own choice")] = None,
    parallel: Annotated[int, typer.Option(help="batches computed at once, which share the threads")] = 1,
    max_batch: Annotated[int, typer.Option(help="inputs of several requests computed together")] = 16,
    batch_window_ms: Annotated[float, typer.Option(help="how long an input waits for company")] = 1.0,
    max_queue: Annotated[int, typer.Option(help="inputs that may wait; more are answered with 429")] = 256,
    max_tokens: Annotated[int, typer.Option(help="of a text; what is longer is cut")] = 512,
    timeout_s: Annotated[float, typer.Option(help="time limit of an answer")] = 30.0,
    state: Annotated[
        Path | None, typer.Option(help="folder of what outlives the service: its log, baselines, jobs and their runs")
    ] = None,
    recipes: Annotated[Path | None, typer.Option(help="folder whose recipes may be started as jobs")] = None,
    max_jobs: Annotated[int, typer.Option(help="jobs that run at once; more are answered with 429")] = 1,
    accuracy: Annotated[float | None, typer.Option(help="alarm: rolling accuracy below this share")] = None,
    f1: Annotated[float | None, typer.Option(help="alarm: rolling F1 below this share")] = None,
    psi: Annotated[float, typer.Option(help="alarm: population stability index from here on")] = 0.25,
    window: Annotated[int, typer.Option(help="newest predictions that are compared with the baseline")] = 500,
) -> None:
    """Answer requests over HTTP, and show a web page at /: predictions, checks, jobs, monitoring; see /openapi.json."""
    from pykd.monitoring import Thresholds
    from pykd.serve import Settings
    from pykd.serve.server import serve as run_service

    settings = Settings(
        models=tuple(models or ()), roots=tuple(root or ()), library=library, offline=offline, host=host, port=port,
        token=token, threads=threads, parallel=parallel, max_tokens=max_tokens, max_batch=max_batch,
        batch_window_ms=batch_window_ms, max_queue=max_queue, timeout_s=timeout_s, state=state, recipes=recipes,
        max_jobs=max_jobs, thresholds=Thresholds(psi=psi, accuracy=accuracy, f1=f1, window=window),
    )  # fmt: skip
    run_service(settings)


def baseline(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="JSON file to write")],
    recipe: Recipe = None,
    settings: Set = None,
    name: Annotated[str | None, typer.Option(help="of the model in the service; default: its folder's")] = None,
) -> None:
    """Measure what a classifier's traffic is held against: confidence, entropy, labels, lengths, embeddings."""
    from pykd.pipeline import baseline_saved

    show(baseline_saved(model, output, recipe=recipe, overrides=settings or (), name=name))
