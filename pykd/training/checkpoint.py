"""Checkpoints of a training run: whole or absent, checked at load, and never a pickle.

A directory holds ``checkpoint.json``, which lists the newest checkpoints (newest first) and names the best one, and for
each of them ``state-<number>.safetensors`` and ``state-<number>.json`` (history and other plain values), with their
sha256 in the list. The two files are renamed into place before the list that names them is replaced, atomically, so
that a run killed at any instruction, or stopped by a full disk, leaves the last complete checkpoints. The numbers count
checkpoints, not steps: a run that was rolled back comes to the same step twice.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pykd.errors import ArtifactError
from pykd.io.files import atomic_write, sha256, writing

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
INDEX = "checkpoint.json"


def has_checkpoint(directory: str | Path) -> bool:
    """True when a complete checkpoint lies in ``directory``."""
    return (Path(directory) / INDEX).is_file()


def save_checkpoint(
    directory: str | Path,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    *,
    step: int,
    keep: int = 1,
    best: bool = False,
) -> Path:
    """Write tensors and JSON-able values as the directory's newest checkpoint; the path of the tensor file.

    keep: how many of the newest stay. best: this is also the best one, which stays until there is a better. Tensors
    that share memory (tied weights) are stored once. Raises ArtifactError when the disk refuses; the checkpoints that
    were there are then still there, whole.
    """
    folder = Path(directory)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    index = _read_index(folder) if has_checkpoint(folder) else {"newest": [], "best": None}
    entries = [*index["newest"], *([index["best"]] if index["best"] else [])]
    _delete_others(folder, entries)  # what a killed process left takes room that this one may need
    name = f"state-{1 + max((entry['number'] for entry in entries), default=0):08d}"
    stored, aliases = _without_duplicates(tensors)
    target, values = folder / f"{name}.safetensors", folder / f"{name}.json"
    _write_tensors(target, stored)
    content = json.dumps({"aliases": aliases, "plain": plain}, allow_nan=False)
    try:
        atomic_write(values, content)
        entry = {"number": int(name.removeprefix("state-")), "step": step, "sha256": [sha256(target), sha256(values)]}
        index = {
            "format_version": FORMAT_VERSION,
            "newest": [entry, *index["newest"]][:keep],
            "best": entry if best else index["best"],
        }
        atomic_write(folder / INDEX, json.dumps(index))
    except ArtifactError:
        _delete_others(folder, entries)
        raise
    _delete_others(folder, [*index["newest"], *([index["best"]] if index["best"] else [])])
    return target


def load_checkpoint(directory: str | Path, *, best: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and plain values of the directory's newest checkpoint, or of the best one.

    A damaged file among the newest is passed over, with a warning, for the one before. Raises ArtifactError when no
    good one is left.
    """
    folder = Path(directory)
    index = _read_index(folder)
    entries = ([index["best"]] if index["best"] else []) if best else index["newest"]
    damaged: ArtifactError | None = None
    for entry in entries:
        try:
            return _read_entry(folder, entry)
        except ArtifactError as error:
            logger.warning("%s", error)
            damaged = damaged or error
    raise damaged or ArtifactError(f"{folder} holds no {'best ' if best else ''}checkpoint; train again")


def best_step(directory: str | Path) -> int | None:
    """The step of the best checkpoint; None when there is none."""
    entry = _read_index(Path(directory))["best"] if has_checkpoint(directory) else None
    return int(entry["step"]) if entry else None


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = index["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot read the checkpoint {folder / INDEX}: {error!r}; train again without it") from None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"checkpoint {folder} has format_version {version}, this pykd reads {FORMAT_VERSION}; "
            "finish the run with the version that began it"
        )
    return dict(index)


def _read_entry(folder: Path, entry: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load_file

    files = [folder / f"state-{entry['number']:08d}.{kind}" for kind in ("safetensors", "json")]
    for file, digest in zip(files, entry["sha256"], strict=True):
        if not file.is_file() or sha256(file) != digest:
            raise ArtifactError(
                f"checkpoint file {file} of step {entry['step']} is missing or was changed (its sha256 differs from "
                f"{INDEX}); delete the directory and train again"
            )
    tensors = load_file(files[0])
    values = json.loads(files[1].read_text(encoding="utf-8"))
    tensors |= {alias: tensors[original] for alias, original in values["aliases"].items()}
    return tensors, values["plain"]


def _write_tensors(target: Path, stored: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.tmp")
    with writing(target):
        try:
            save_file(stored, temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _delete_others(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Delete the files of checkpoints that are not listed, and what was only half written."""
    listed = {f"state-{entry['number']:08d}.{kind}" for entry in entries for kind in ("safetensors", "json")}
    for pattern in ("state-*.safetensors", "state-*.json", ".state-*.tmp", f".{INDEX}.*.tmp"):
        for old in folder.glob(pattern):
            if old.name not in listed:
                old.unlink()


def _without_duplicates(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors that share no memory, and which name stands for which stored one."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        stored[name] = tensor.detach().to("cpu").contiguous()
    seen: set[int] = set()
    for name, tensor in stored.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            stored[name] = tensor.clone()
        seen.add(pointer)
    return stored, aliases
