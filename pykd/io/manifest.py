"""The manifest of a saved model: which files belong to it, their sizes and checksums, where it comes from."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Collection
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pykd.errors import ArtifactError
from pykd.io.files import sha256

MANIFEST = "pykd_manifest.json"
#: Formats up to this one can be read. 1: the first.
FORMAT_VERSION = 1


def write_manifest(folder: Path, *, provenance: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Describe every file that is in `folder` now. Call it last.

    `provenance` (teacher, recipe, data fingerprint ...) and `stages` (`model.pykd_report`) must be JSON values; they
    are returned unchanged by `read_manifest`. Raises ArtifactError if they are not.
    """
    files = {
        str(file.relative_to(folder)): {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": files,
        "provenance": provenance,
        "stages": stages,
    }
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"provenance and model.pykd_report must hold JSON values only ({error}); "
            "convert tensors and arrays to numbers."
        ) from error
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python, pykd, torch, and what else is installed of the libraries that models come from."""
    import torch

    from pykd import __version__

    found = {"python": platform.python_version(), "pykd": __version__, "torch": torch.__version__}
    for name in ("transformers", "torchvision", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved folder. Raises ArtifactError if it is absent, damaged, or of a newer format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} has no {MANIFEST}, so it was not written by pykd.save_pretrained; "
            "a folder or hub name of transformers loads with AutoModelFor....from_pretrained."
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from error
    check_version(manifest, str(path))
    if not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} does not list the files of the model; copy the folder again.")
    if not isinstance(manifest.get("provenance", {}), dict):
        raise ArtifactError(f"{path} does not say where the model comes from; copy the folder again.")
    return dict(manifest)


def check_version(content: Any, where: str) -> None:
    """Raise ArtifactError unless `content["format_version"]` is one that this pykd reads."""
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{where} has no valid format_version (found {version!r}); it is damaged or not pykd's.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format_version {version}, which a newer pykd wrote; this one reads up to {FORMAT_VERSION}. "
            "Upgrade pykd: pip install -U pykd."
        )


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of the manifest, sizes first, and return the manifest.

    Raises ArtifactError that names the first file that is missing, truncated or altered, with expected and found.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        _check(folder / name, entry)
    return manifest


def owned(folder: Path) -> Collection[str] | None:
    """The files that pykd wrote into a folder, or None if it holds no readable manifest of ours."""
    try:
        return {MANIFEST, *read_manifest(folder)["files"]}
    except ArtifactError:
        return None


def _check(path: Path, entry: dict[str, Any]) -> None:
    again = "copy the folder again, or save the model again with pykd.save_pretrained"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing, though {MANIFEST} lists it; {again}.")
    found = path.stat().st_size
    if found != entry["bytes"]:
        raise ArtifactError(f"{path} is truncated or altered: expected {entry['bytes']} bytes, found {found}; {again}.")
    digest = sha256(path)
    if digest != entry["sha256"]:
        raise ArtifactError(f"{path} is altered: expected sha256 {entry['sha256']}, found {digest}; {again}.")
