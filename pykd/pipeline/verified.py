"""`pykd verify`, and what the service checks: a model loads by its own library and computes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.evaluation.counting import count_parameters, saved_bytes
from pykd.io.files import sha256
from pykd.io.manifest import MANIFEST, read_manifest
from pykd.models.adapter import logits, num_classes, origin
from pykd.models.example import example_batch
from pykd.pipeline.references import find_reference, load_reference, unknown_reference
from pykd.pipeline.saved import example_of, load_saved, provenance_of


def verify(name: str, *, library: Path | None = None, offline: bool = False) -> dict[str, Any]:
    """Check a model: loading by the official library, one forward pass; facts to print.

    name: a folder, or one of the reference models (DistilBERT, T5-small, MobileNetV2, ResNet-18, in any spelling),
    which `load_reference` looks for as library and offline say. Raises ArtifactError or ModelLoadError with the reason.
    """
    reference = None if Path(name).exists() else find_reference(name)
    if reference is None:
        if not Path(name).exists() and Path(name).name == name:
            raise ArtifactError(f"{name} is not a folder, and of reference models: {unknown_reference(name)}")
        return verify_saved(name)
    return _printed(check_reference(name, library=library, offline=offline))


def check_reference(name: str, *, library: Path | None = None, offline: bool = False) -> dict[str, Any]:
    """The facts of :func:`verify` about a reference model, as JSON values. Raises ModelLoadError or ArtifactError."""
    reference = find_reference(name)
    if reference is None:
        raise ArtifactError(unknown_reference(name))
    loaded = load_reference(reference, library=library, offline=offline)
    scores = _forward(loaded.model, example_batch(loaded.model), loaded.source)
    return {
        "model": reference.title,
        "source": f"{reference.library} {loaded.source}",
        "revision": loaded.revision,
        **_counted(loaded.model, loaded.weights, scores),
    }


def check_saved(path: str | Path) -> dict[str, Any]:
    """Facts about a saved model, as JSON values: checksums, loading by the official library, one forward pass.

    Raises ArtifactError or ModelLoadError with the reason why it is not usable.
    """
    folder = Path(path)
    model = load_saved(folder)
    scores = _forward(model, example_of(model, folder), str(folder))
    source = origin(model)
    revision = provenance_of(folder).get("recipe_hash") or "a local folder, which names none"
    return {
        "model": folder.name,
        "source": f"{source['source']} {source.get('name') or source.get('model_type') or ''}".strip(),
        "revision": revision,
        **_counted(model, sorted(folder.glob("*.safetensors")), scores),
    }


def verify_saved(path: str | Path) -> dict[str, Any]:
    """The facts of :func:`check_saved`, and what pykd knows of a folder that it saved, to be printed."""
    folder = Path(path)
    facts = check_saved(folder)
    ours = (folder / MANIFEST).exists()
    stages = [str(stage.get("stage", "?")) for stage in (read_manifest(folder)["stages"] if ours else None) or []]
    return {
        **_printed(facts),
        "model": str(folder),
        "bytes": f"{saved_bytes(folder):,}",
        "checksums": "match the manifest" if ours else "no manifest: not saved by pykd",
        "stages": stages or "none",
    }


def _printed(facts: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()}


def _forward(model: nn.Module, batch: dict[str, Tensor], where: str) -> Tensor:
    with torch.no_grad():
        scores = logits(model, batch)
    if not bool(scores.isfinite().all()):
        raise ArtifactError(
            f"{where} loads, but its forward pass gives values that are not finite; save the model again"
        )
    return scores


def _counted(model: nn.Module, weights: Sequence[Path], scores: Tensor) -> dict[str, Any]:
    parameters, nonzero = count_parameters(model)
    return {
        "class": type(model).__name__,
        "classes": num_classes(model),
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "sha256": _checksum(weights),
        "forward": f"logits {tuple(scores.shape)}, finite",
    }


def _checksum(weights: Sequence[Path]) -> str:
    """The sha256 of the file of the weights; of several, that of their checksums in the order of their names."""
    found = [sha256(file) for file in weights]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
