"""What a cache of a teacher looks like on disk: shards of tensors, and a manifest that is replaced as they are added.

A shard holds, in the order of the training set, for every position that counts: `ids` (positions, k) as the low 16 bits
of the class, `ids_high` (8 bits more, from 65536 classes on), `log_probs` (positions, k), `tail` (positions,) the mass
that was not kept, float16, where there is any; and `offsets` (examples + 1,) where an example has several positions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io.files import atomic_write, check_vacant, sha256

MANIFEST = "pykd_teacher_cache.json"
#: 1: the first.
FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: Below this many classes an id takes two bytes, and all bits set still means that there is none.
NARROW_CLASSES = 65_536


def pack_ids(ids: Tensor, classes: int) -> dict[str, Tensor]:
    """Class ids (int64, -1: none) in two bytes each, or three from 65536 classes on."""
    assert classes < 1 << 24, "three bytes hold an id"
    packed = {"ids": (ids & 0xFFFF).to(torch.int16)}
    if classes >= NARROW_CLASSES:
        packed["ids_high"] = (ids >> 16 & 0xFF).to(torch.uint8)
    return packed


def unpack_ids(low: Tensor, high: Tensor | None) -> Tensor:
    """The ids of `pack_ids` as int32."""
    ids, none = low.to(torch.int32) & 0xFFFF, 0xFFFF
    if high is not None:
        ids, none = ids | high.to(torch.int32) << 16, 0xFFFFFF
    return torch.where(ids == none, -1, ids)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the class of a model and every tensor of its state: name, type, shape and bytes."""
    state = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def begin(folder: Path, identity: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """The manifest that the run continues, or that of a new cache; ArtifactError where the folder holds another."""
    for left in (*folder.glob(f".{MANIFEST}.*.tmp"), *folder.glob(".shard-*.safetensors.*.tmp")):
        left.unlink()  # of a process that was killed while it wrote
    if not (folder / MANIFEST).exists():
        orphan = [folder / shard_name(0)]  # its process was killed before the manifest could name it
        check_vacant(folder, overwrite=True, owned=lambda _: [file.name for file in orphan])
        return {"format_version": FORMAT_VERSION, **identity, "shards": []}
    manifest = read_manifest(folder)
    if not resume:
        raise ArtifactError(f"{folder} already holds a cache; continue it with resume=True, or choose another folder.")
    for name, now in identity.items():
        if manifest.get(name) != now:
            raise ArtifactError(
                f"{folder} holds a cache of another run: {name} was {manifest.get(name)}, is now {now}; "
                "choose another folder, or delete this one."
            )
    return manifest


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def add_shard(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], *, first: int, last: int) -> None:
    """Write examples first..last-1 as the next shard, then the manifest that names it; each is whole or absent."""
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    name = shard_name(len(manifest["shards"]))
    atomic_write(folder / name, content)
    facts = {"file": name, "first": first, "last": last, "positions": len(tensors["ids"]), "bytes": len(content)}
    manifest["shards"].append(facts | {"sha256": hashlib.sha256(content).hexdigest()})
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises ArtifactError if it is absent, damaged, or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {MANIFEST}; write a cache there with pykd.cache_teacher.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format_version {version!r}, this pykd reads {FORMAT_VERSION}; cache again.")
    return {
        **manifest,
        "counted": manifest.get("counted", "attention_mask"),
    }  # caches from before there were others do not say it


def check_shards(folder: Path, manifest: dict[str, Any], *, contents: bool) -> None:
    """Raise ArtifactError that names the first shard that is missing, truncated or, if `contents`, altered."""
    again = "copy the folder again, or delete it and cache again"
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, though {MANIFEST} lists it; {again}.")
        found = path.stat().st_size
        if found != shard["bytes"]:
            raise ArtifactError(
                f"{path} is truncated or altered: expected {shard['bytes']} bytes, found {found}; {again}."
            )
        if contents and sha256(path) != shard["sha256"]:
            raise ArtifactError(f"{path} is altered: its sha256 is not the one in {MANIFEST}; {again}.")
