"""Commands that make another model of a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pykd.cli.console import show
from pykd.cli.options import Exclude, Include, ModelDir, OutputDir, Recipe, Set


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
    show(prune_saved(model, output, recipe=recipe, overrides=settings or (), **options))


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
    show(quantize_saved(model, output, method=method, **options))


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
    show(facts)
    if not met:
        raise typer.Exit(1)


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
    show(export_saved(model, output, format=format, overwrite=overwrite, **options))
