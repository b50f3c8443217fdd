"""Saved models as evidence: beside each other on the same data, and before safety benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pykd.data.safety import load_prompts
from pykd.errors import DataError
from pykd.evaluation import (
    Comparison,
    Explanations,
    compare,
    evaluate,
    explanation_similarity,
    interleaved_latency,
    write_report,
)
from pykd.evaluation.safety import Safety, evaluate_safety
from pykd.pipeline.saved import data_of, load_saved, tokenizer_of
from pykd.recipe import RecipeLike


def compare_saved(
    paths: Sequence[str | Path],
    *,
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 64,
    latency_rounds: int = 50,
    speed_rounds: int = 20,
    batch_sizes: Sequence[int] = (),
    lengths: Sequence[int] = (),
    explain: int = 0,
    output: str | Path | None = None,
) -> tuple[Comparison, dict[str, Explanations]]:
    """Measure saved models on the same held-out data and compare them with the first.

    recipe: whose data, by default that of the first model. speed_rounds: alternating rounds at batch 1, for the ratios.
    explain: how many examples' attributions to compare with the first model's, 0 for none. output: folder for
    report.html, report.json and report.md. Other options as for :func:`pykd.evaluate`.

    Returns the comparison, and the explanations by model. Raises ValueError for fewer than two models, and what
    evaluate and explanation_similarity raise.
    """
    folders = [Path(path) for path in paths]
    if len(folders) < 2:
        raise ValueError(f"compare needs at least two saved models, got {len(folders)}")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    data = data_of(folders[0], recipe, overrides)
    models = {name: load_saved(folder) for name, folder in zip(names, folders, strict=True)}
    reports = [
        evaluate(
            model,
            data,
            name=name,
            batch_size=batch_size,
            latency_rounds=latency_rounds,
            batch_sizes=batch_sizes,
            lengths=lengths,
            path=folder,
        )
        for (name, model), folder in zip(models.items(), folders, strict=True)
    ]
    timed = interleaved_latency(models, data.example(), rounds=speed_rounds)
    for row, name in enumerate(names[1:], 1):
        reports[row] = reports[row].with_speedup(names[0], timed.speedup(name))
        if row > 1:
            reports[row] = reports[row].with_speedup(names[row - 1], timed.speedup(name, baseline=names[row - 1]))
    found = compare(reports)
    explained = {
        name: explanation_similarity(models[name], models[names[0]], data, examples=explain)
        for name in (names[1:] if explain else ())
    }
    if output is not None:
        remarks = [f"{name} beside {names[0]}: {similar.sentence()}." for name, similar in explained.items()]
        write_report(output, found, data, title=" and ".join(names), remarks=remarks)
    return found, explained


def safety_saved(
    path: str | Path,
    benchmarks: Sequence[str],
    *,
    harmful_classes: Sequence[str] = ("1",),
    threshold: float = 0.5,
    limits: Mapping[str, float] | None = None,
    **layout: Any,
) -> Safety:
    """Put a saved classifier of texts before safety benchmarks, each written as [PRESET=]FILE[:harmful|:harmless].

    What follows the colon says that all prompts of the file are of that kind. layout: arguments of
    :func:`pykd.data.safety.load_prompts` for files without a preset. Others as for evaluate_safety. Raises what those
    raise, and DataError for a model that was saved without its tokenizer.
    """
    tokenizer = tokenizer_of(Path(path))
    if tokenizer is None:
        raise DataError(f"{path} holds no tokenizer; save one with the model, or copy its files into the folder")
    prompts = []
    for benchmark in benchmarks:
        preset, given, source = benchmark.rpartition("=")
        file, _, kind = source.rpartition(":")
        always = {"harmful": True, "harmless": False}.get(kind) if file else None
        chosen: dict[str, Any] = {"preset": preset} if given else dict(layout)
        prompts.append(load_prompts(source if always is None else file, always=always, **chosen))
    return evaluate_safety(
        load_saved(path),
        prompts,
        tokenizer=tokenizer,
        harmful_classes=harmful_classes,
        threshold=threshold,
        limits=limits,
    )
