"""Checkpoints of a training run: whole or absent, checked at load, and never a pickle.

A directory holds ``checkpoint.json`` (step, history, plain values, and name and sha256 of the tensor file) and one
``state-<step>.safetensors``. The tensor file is renamed into place before the JSON that names it, and the JSON is
replaced atomically, so that a run killed at any instruction leaves the last complete checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykd.errors import ArtifactError
from pykd.io.files import atomic_write, sha256, writing

FORMAT_VERSION = 1
INDEX = "checkpoint.json"


def has_checkpoint(directory: str | Path) -> bool:
    """True when a complete checkpoint lies in ``directory``."""
    return (Path(directory) / INDEX).is_file()


def save_checkpoint(directory: str | Path, tensors: dict[str, Tensor], plain: dict[str, Any], *, step: int) -> Path:
    """Write tensors and JSON-able values as the directory's checkpoint and delete the one before.

    Tensors that share memory (tied weights) are stored once. Raises ArtifactError when the disk refuses.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stored, aliases = _without_duplicates(tensors)
    target = folder / f"state-{step:08d}.safetensors"
    temporary = folder / f".{target.name}.tmp"
    with writing(target):
        save_file(stored, temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    index = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "file": target.name,
        "sha256": sha256(target),
        "aliases": aliases,
        "plain": plain,
    }
    atomic_write(folder / INDEX, json.dumps(index, allow_nan=False))
    for pattern in ("state-*.safetensors", ".state-*.tmp", f".{INDEX}.*.tmp"):
        for old in folder.glob(pattern):
            if old != target:
                old.unlink()
    return target


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and plain values of the directory's checkpoint; ArtifactError when it is damaged."""
    from safetensors.torch import load_file

    folder = Path(directory)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version, name, digest = index["format_version"], index["file"], index["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot read the checkpoint {folder / INDEX}: {error!r}; train again without it") from None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"checkpoint {folder} has format_version {version}, this pykd reads {FORMAT_VERSION}; "
            "finish the run with the version that began it"
        )
    target = folder / str(name)
    if not target.is_file() or sha256(target) != digest:
        raise ArtifactError(
            f"checkpoint file {target} is missing or was changed (its sha256 differs from {INDEX}); "
            "delete the directory and train again"
        )
    tensors = load_file(target)
    tensors |= {alias: tensors[original] for alias, original in index["aliases"].items()}
    return tensors, index["plain"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into named tensors and JSON-able values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in plain["values"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


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
