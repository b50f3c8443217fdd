"""The command `pykd`: the only part of the package that prints.

Wrong input ends with exit code 2 and one sentence on stderr (`--debug` adds the traceback), Ctrl-C with 130, a saved
model that does not predict what it predicted in memory with 1.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

#: Exit code after Ctrl-C, as shells count it: 128 + SIGINT.
INTERRUPTED = 130

app = typer.Typer(
    name="pykd",
    help="Distil, prune and quantize models; prove that the result is smaller, faster and still right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelDir = Annotated[Path, typer.Argument(help="folder that pykd saved (or a local Hugging Face folder)")]
OutputDir = Annotated[Path, typer.Argument(help="folder to write; must not hold anything else")]
Include = Annotated[list[str] | None, typer.Option(help="only layers whose name matches; may be repeated")]
Exclude = Annotated[list[str] | None, typer.Option(help="not layers whose name matches; may be repeated")]
Recipe = Annotated[Path | None, typer.Option(help="take the data from this recipe, not from the model's own")]
Library = Annotated[
    Path | None,
    typer.Option(help="where reference models are looked for, not in caches and the network: a folder or a cache"),
]
Offline = Annotated[bool, typer.Option("--offline", help="reference models: from the caches of this machine only")]
Workers = Annotated[int, typer.Option(min=1, help="parts made at a time, each on a device of its own")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key of the recipe")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug messages")] = False,
) -> None:
    _talk(logging.DEBUG if debug else logging.INFO)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file; ready ones are in recipes/")],
    output: Annotated[Path | None, typer.Option(help="folder for the results; default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that is in the folder")] = False,
    short: Annotated[bool, typer.Option("--short", help="apply the recipe's own settings for a quick try")] = False,
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
        if _rank() == 0:
            typer.echo(f"\n{done.summary(width=_columns())}\n")
        identical &= done.reload.identical
    if not identical:
        raise typer.Exit(1)


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file with one stage, `chain`")],
    output: Annotated[Path | None, typer.Option(help="folder for the results; default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted study")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that is in the folder")] = False,
    short: Annotated[bool, typer.Option("--short", help="apply the recipe's own settings for a quick try")] = False,
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
    typer.echo(f"\n{done.summary(width=_columns())}\n")
    if not done.run.reload.identical:
        raise typer.Exit(1)


@app.command(hidden=True)
def part(
    recipe: Annotated[Path, typer.Argument(help="recipe of the part, or of the study that it is an arm of")],
    folder: Annotated[Path, typer.Argument(help="where it goes")],
    teachers: Annotated[Path, typer.Option(help="folder of trained teachers")],
    arm: Annotated[str | None, typer.Option(help="the arm, as STUDENT-ARM")] = None,
) -> None:
    """Make one part of a study: what --workers starts on each device."""
    from pykd.pipeline.parts import do_part

    do_part(recipe, folder, teachers=teachers, arm=arm)


@app.command()
def evaluate(
    model: ModelDir,
    recipe: Recipe = None,
    settings: Set = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    latency_rounds: Annotated[int, typer.Option(min=1, help="timed calls at batch 1")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="threads; default: torch's own choice")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="also write the numbers to this file")] = None,
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


@app.command()
def compare(
    models: Annotated[list[Path], typer.Argument(help="saved models; the first is what the others are compared with")],
    recipe: Recipe = None,
    settings: Set = None,
    output: Annotated[Path | None, typer.Option(help="folder for report.html, report.json and report.md")] = None,
    explain: Annotated[
        int, typer.Option(min=0, help="compare the attributions of so many examples (integrated gradients)")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    latency_rounds: Annotated[int, typer.Option(min=1, help="timed calls at batch 1")] = 50,
    speed_rounds: Annotated[int, typer.Option(min=1, help="alternating rounds, for the ratios")] = 20,
    batch_sizes: Annotated[list[int] | None, typer.Option("--rows", help="further batch sizes to time")] = None,
    lengths: Annotated[list[int] | None, typer.Option("--tokens", help="further lengths to time")] = None,
) -> None:
    """Measure saved models on the same held-out data, beside each other: ratios, intervals, paired tests, behaviour."""
    from pykd.pipeline import compare_saved

    options: dict[str, Any] = {"batch_size": batch_size, "latency_rounds": latency_rounds, "speed_rounds": speed_rounds}
    options |= {"batch_sizes": batch_sizes or (), "lengths": lengths or (), "explain": explain, "output": output}
    found, explained = compare_saved(models, recipe=recipe, overrides=settings or (), **options)
    typer.echo(found.text(width=_columns()) + "\n\n" + found.behaviour_text(width=_columns()))
    for name, similar in explained.items():
        typer.echo(f"{name}: {similar.sentence()}")
    if output is not None:
        typer.echo(f"report: {output / 'report.html'}")


@app.command()
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
    output: Annotated[Path | None, typer.Option("--json", help="also write the numbers to this file")] = None,
) -> None:
    """Put a text classifier before safety benchmarks; exit code 1 if it lets through or stops more than its limits."""
    from pykd.evaluation.comparison import table
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
    typer.echo("\n".join([table(found.cells(), width=_columns()), "", *(found.failures or ("every limit is met",))]))
    if output is not None:
        atomic_write(output, json.dumps(found.to_dict(), indent=2) + "\n")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def prune(
    model: ModelDir,
    output: OutputDir,
    method: Annotated[
        str,
        typer.Option(help="magnitude, random, wanda or sparsegpt: weights; channels, heads, neurons or layers: units"),
    ] = "magnitude",
    sparsity: Annotated[
        float | None, typer.Option(help="share of weights, or of units per group, that goes; default 0.5")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="weights: meet the share in global, layer or row")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="weights: 2:4, two kept of four neighbours; 4x1, blocks of outputs x inputs")
    ] = None,
    importance: Annotated[str | None, typer.Option(help="units: l2, l1, taylor or activation")] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="training examples that wanda, sparsegpt, taylor and activation look at")
    ] = 256,
    recipe: Recipe = None,
    settings: Set = None,
    include: Include = None,
    exclude: Exclude = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="weights: measure sparse against dense for calls of so many rows; may be repeated"),
    ] = None,
) -> None:
    """Prune a saved model into a new folder."""
    from pykd.pipeline import prune_saved

    options: dict[str, Any] = {"scope": scope, "pattern": pattern, "importance": importance, "rows": rows or None}
    options |= {"method": method, "sparsity": sparsity, "samples": samples, "include": include, "exclude": exclude}
    _table(prune_saved(model, output, recipe=recipe, overrides=settings or (), **options))


@app.command()
def quantize(
    model: ModelDir,
    output: OutputDir,
    scheme: Annotated[str, typer.Option(help="w4a16, w4a8, nf4, fp4, w8a8, w8a8_static, w8a16, bf16, fp16")] = "w4a16",
    method: Annotated[str, typer.Option(help="rtn or hqq; gptq or awq, which look at data")] = "rtn",
    group_size: Annotated[int, typer.Option(help="weights that share a scale: 32, 64 or 128")] = 64,
    symmetric: Annotated[bool, typer.Option(help="w4a16 and w4a8 without zero points")] = True,
    observer: Annotated[str, typer.Option(help="range for w8a8_static: minmax, percentile or mse")] = "minmax",
    samples: Annotated[int, typer.Option(min=1, help="training examples to look at")] = 256,
    embeddings: Annotated[str | None, typer.Option(help="also the embeddings: w8a16, w4a16, nf4, fp4, bf16")] = None,
    recipe: Recipe = None,
    settings: Set = None,
    include: Include = None,
    exclude: Exclude = None,
) -> None:
    """Quantize a saved model into a new folder."""
    from pykd.pipeline import quantize_saved

    options: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "symmetric": symmetric, "samples": samples}
    options |= {
        "embeddings": embeddings,
        "observer": observer,
        "include": include,
        "exclude": exclude,
        "recipe": recipe,
        "overrides": settings or (),
    }
    _table(quantize_saved(model, output, method=method, **options))


@app.command()
def compress(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="folder of the search; an interrupted one goes on there")],
    size_mb: Annotated[float | None, typer.Option(help="target: 10^6 bytes of the saved weights")] = None,
    ratio: Annotated[float | None, typer.Option(help="target: times smaller than now")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="target: P95 of a call at batch 1 on this machine")] = None,
    max_metric_drop: Annotated[float | None, typer.Option(help="target: share that the quality may lose")] = None,
    epochs: Annotated[float, typer.Option(help="of training each candidate with the teacher, the model itself")] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="of that training")] = 32,
    lr: Annotated[float, typer.Option(help="of that training")] = 3e-4,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="of the linear layers, none for as they are; repeatable [none, w8a8, w4a16]"),
    ] = None,
    embeddings: Annotated[str, typer.Option(help="scheme of the embeddings beside a scheme, or none")] = "w8a16",
    method: Annotated[str, typer.Option(help="how 4-bit codes are chosen: rtn, hqq, gptq or awq")] = "rtn",
    group_size: Annotated[int, typer.Option(min=1, help="weights that share a scale in 4 bits")] = 64,
    max_candidates: Annotated[int, typer.Option(min=1, help="how many are evaluated")] = 12,
    max_seconds: Annotated[float | None, typer.Option(help="for how long new ones are begun")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    recipe: Recipe = None,
    settings: Set = None,
) -> None:
    """Search depth x pruning x bits for the best model within a target; exit code 1 where none is."""
    from pykd.pipeline.saved import compress_saved

    limits = {"size_mb": size_mb, "ratio": ratio, "latency_ms": latency_ms, "max_metric_drop": max_metric_drop}
    target = {name: value for name, value in limits.items() if value is not None}
    options: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    options |= {"max_candidates": max_candidates, "max_seconds": max_seconds, "method": method}
    options |= {"embeddings": None if embeddings == "none" else embeddings, "group_size": group_size}
    if scheme:
        options["schemes"] = [None if name == "none" else name for name in scheme]
    met, facts = compress_saved(model, output, target, recipe=recipe, overrides=settings or (), **options)
    _table(facts)
    if not met:
        raise typer.Exit(1)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="folder of a run, one that pykd saved, or a Hugging Face folder")],
    output: OutputDir,
    format: Annotated[
        str,
        typer.Option(
            help="dense: an ordinary checkpoint that loads without pykd; onnx: a file for ONNX Runtime, packed; "
            "compressed-tensors: a folder for vLLM, of w4a16, w8a16 or w8a8 layers; gguf: the weights of a Llama"
        ),
    ] = "dense",
    recipe: Annotated[
        Path | None, typer.Option(help="onnx: check on this recipe's held-out data, not on the model's own")
    ] = None,
    settings: Set = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="onnx: check on drawn inputs, where the data is not at hand")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the export that is in the folder")] = False,
) -> None:
    """Write a model in a format that others read, and check what was written against the model."""
    from pykd.pipeline import export_saved

    options: dict[str, Any] = {"recipe": recipe, "overrides": settings or (), "synthetic": synthetic}
    _table(export_saved(model, output, format=format, overwrite=overwrite, **options))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="folder of a model, or distilbert, t5-small, mobilenet_v2, resnet18")],
    library: Library = None,
    offline: Offline = False,
) -> None:
    """Check a model: checksums, loading by its own library, one forward pass; report source, size and checksum."""
    from pykd.pipeline import verify as checked

    _table(checked(model, library=library, offline=offline))


@app.command()
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
        token=token, threads=threads, max_tokens=max_tokens, max_batch=max_batch,
        batch_window_ms=batch_window_ms, max_queue=max_queue, timeout_s=timeout_s, state=state, recipes=recipes,
        max_jobs=max_jobs, thresholds=Thresholds(psi=psi, accuracy=accuracy, f1=f1, window=window),
    )  # fmt: skip
    run_service(settings)


@app.command()
def baseline(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="JSON file to write")],
    recipe: Recipe = None,
    settings: Set = None,
    name: Annotated[str | None, typer.Option(help="of the model in the service; default: its folder's")] = None,
) -> None:
    """Measure what a classifier's traffic is held against: confidence, entropy, labels, lengths, embeddings."""
    from pykd.pipeline import baseline_saved

    _table(baseline_saved(model, output, recipe=recipe, overrides=settings or (), name=name))


@app.command()
def monitor(
    run: Annotated[Path, typer.Argument(help="folder of a run or of a service, or its log; it may run elsewhere")],
    once: Annotated[bool, typer.Option("--once", help="show it as it is now and leave")] = False,
) -> None:
    """Watch a run's trainings (loss, validations, rate, time left) or a service's models (traffic, drift, alarms)."""
    from pykd.pipeline.monitor import watch

    watch(run, once=once)


@app.command()
def info() -> None:
    """What this installation can run, and which kernel serves which operation."""
    from pykd.ops.dispatch import build_info

    found = build_info()
    table = found.pop("table")
    _table(found)
    for row in table:
        typer.echo(f"  {row['op']:<14} {row['device']:<6} {row['when']:<44} {row['implementation']}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, after one sentence on stderr where something is wrong."""
    code = _main(arguments)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        # Taking a process group down can wait forever for its own threads, which want Python's lock.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(arguments: list[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # accepted anywhere, as newcomers write it
    words = [*(["--debug"] if debug else []), *(word for word in words if word != "--debug")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(words, standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _say(*_sentence(error))
    if code == INTERRUPTED:  # also what typer makes of Ctrl-C itself
        again = "; what is finished is kept, continue with --resume" if {"run", "study"} & set(words[:2]) else ""
        return _say(f"interrupted{again}", INTERRUPTED)
    return int(code or 0)


def _sentence(error: Exception) -> tuple[str, int]:
    from pykd.errors import PykdError

    if hasattr(error, "format_message"):  # a usage error of click, which newer typers carry inside themselves
        return f"{error.format_message().rstrip('.')}; see pykd --help", 2
    if isinstance(error, PykdError | ValueError):
        return " ".join(str(error).split()), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left for {error.filename or 'the output'}: make room, then continue with --resume", 2
    if isinstance(error, ImportError):
        return f"{error}: install what recipes need with `pip install 'pykd[all]'`", 2
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", 1


def _say(text: str, code: int) -> int:
    if text:
        process = f"process {_rank()}: " if _rank() else ""
        typer.echo(f"pykd: {process}{text}", err=True)
    return code


def _rank() -> int:
    """Number of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _columns() -> int | None:
    """Width of the terminal; None where the output goes to a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _table(facts: dict[str, Any]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")


class _Console(logging.StreamHandler[Any]):
    """Messages on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def _talk(level: int) -> None:
    """Send pykd's log messages to stderr, once."""
    package = logging.getLogger("pykd")
    handler = next((h for h in package.handlers if getattr(h, "pykd_console", False)), None)
    if handler is None:
        handler = _Console()
        handler.pykd_console = True  # type: ignore[attr-defined]
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        package.addHandler(handler)
        package.propagate = False
    handler.setLevel(level if _rank() == 0 else logging.ERROR)
    package.setLevel(level)
