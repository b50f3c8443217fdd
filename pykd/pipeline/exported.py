"""A saved model, or that of a run, in the format of someone else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError, nearest
from pykd.evaluation.counting import saved_bytes
from pykd.evaluation.exported import FORMATS, export
from pykd.io.manifest import MANIFEST, read_manifest
from pykd.models.adapter import origin
from pykd.pipeline.directory import STATE
from pykd.pipeline.saved import data_of, example_of, load_saved, tokenizer_of
from pykd.recipe import RecipeLike

#: Of the check of a router in ONNX: choices between two as good, which rounding decided otherwise, in words.
CHOICES = {
    "rows_at_threshold": "rows at the threshold that took their other branch",
    "tokens_between_experts": "tokens that took another expert as good",
}


def export_saved(
    path: str | Path,
    output: str | Path,
    *,
    format: str = "dense",
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    synthetic: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a saved model, or the final model of a run's folder, in another format (:func:`pykd.export`).

    An ONNX file is checked on held-out examples of ``recipe``, by default of the recipe that made the model; on drawn
    inputs where there is none, or with ``synthetic``. Returns facts to print.
    """
    folder = Path(path)
    folder = folder / "model" if (folder / STATE).exists() else folder
    if format != "dense" and format not in FORMATS:
        raise ArtifactError(nearest("format", format, ["dense", *FORMATS]))
    model = load_saved(folder)
    provenance = dict(read_manifest(folder).get("provenance", {})) if (folder / MANIFEST).exists() else {}
    data: Any = None
    if format == "onnx" and not synthetic and (recipe is not None or "recipe" in provenance):
        data = data_of(folder, recipe, overrides)
    elif origin(model)["source"] == "torchvision":
        data = [example_of(model, folder)]
    options: dict[str, Any] = {"tokenizer": tokenizer_of(folder), "provenance": provenance, "overwrite": overwrite}
    return _facts(export(model, output, format=format, data=data, **options), saved_bytes(folder), str(output))


def _facts(record: dict[str, Any], before: int, output: str) -> dict[str, Any]:
    """The record in words."""
    now, check = record["size_bytes"], record.get("check", {})
    facts = {"saved": output, "bytes": f"{before:,} -> {now:,} ({before / now:.2f}x smaller)"}
    if "labels" in check:
        near = "".join(f"; {words}: {check[key]}" for key, words in CHOICES.items() if key in check)
        facts["check"] = (
            f"{check['labels'] - check['different_labels']} of {check['labels']} labels equal, logits within "
            f"{check['largest_difference']:.1e} of the largest (allowed: {check['bound']:g})"
        ) + near
    elif check:
        facts["check"] = f"{check['layers']} packed layers read back, within {check['largest_difference']:.1e}"
    if "latency_ms" in record:
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in record["latency_ms"].items())
        facts["latency"] = f"{times}: {record['faster_than_pykd']:.2f}x as fast as pykd, batch 1"
    return facts | ({"notes": record["notes"]} if record["notes"] else {})
