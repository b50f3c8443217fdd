"""Which folders the service touches: those below its roots, every link followed, with weights in safetensors only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pykd.errors import ArtifactError
from pykd.io.manifest import MANIFEST, read_manifest
from pykd.io.save import CONFIG, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"
#: With this file transformers loads the model that it names.
ADAPTER = "adapter_config.json"


class OutsideRootsError(ValueError):
    """A path is not below any root, or leads out of it by a link."""


def below_roots(path: str, roots: Sequence[Path]) -> Path:
    """The real path of an existing folder or file, named absolutely or relative to a root.

    Raises OutsideRootsError for what lies outside or does not exist: from outside, the two look the same.

    >>> below_roots("/etc/passwd", [Path("models")])
    Traceback (most recent call last):
        ...
    pykd.serve.roots.OutsideRootsError: '/etc/passwd' is not below an allowed folder
    """
    for root in (root.resolve() for root in roots):
        try:
            found = (root / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # absent, unreadable, too long, a NUL inside, a circle of links
            continue
        if found.is_relative_to(root):
            return found
    raise OutsideRootsError(f"{path!r} is not below an allowed folder")


def check_folder(folder: Path, roots: Sequence[Path] | None = None) -> None:
    """Raise ArtifactError unless a folder's weights are safetensors; with roots, also unless all its files lie in them.

    No weights in another format are read, nothing is unpickled, and code that a configuration names is not run.
    """
    if roots is not None:
        for file in sorted(folder.rglob("*")):
            try:
                below_roots(str(file), roots)
            except OutsideRootsError:
                raise ArtifactError(f"{file.name} in {folder.name} leads out of the allowed folders") from None
    if (folder / ADAPTER).exists():
        raise ArtifactError(f"{folder.name} holds an adapter, whose model lies elsewhere: merge the two and save that")
    if (folder / MANIFEST).exists():
        for name in read_manifest(folder)["files"]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{MANIFEST} of {folder.name} names {name!r}, which lies outside")
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder.name} holds no {CONFIG}, so it is no saved model")
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        raise ArtifactError(
            f"{folder.name} holds no {WEIGHTS}: weights are read from safetensors only, never unpickled"
        )
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        wrong = sorted(str(name) for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{INDEX} of {folder.name} cannot be read ({error})") from None
    if wrong:
        raise ArtifactError(f"{INDEX} of {folder.name} names {wrong[0]!r}: weights are read from safetensors only")
