"""Four models that everyone knows, loaded by the libraries that publish them: from a folder, a cache or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pykd.errors import ModelLoadError, nearest
from pykd.io.files import sha256
from pykd.io.save import CONFIG, WEIGHTS
from pykd.models.torchvision import ensure_torchvision, load_torchvision
from pykd.pipeline.saved import load_saved

#: Files of a repository that a model is loaded from: no other format of weights, no code.
NEEDED = ("*.json", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True)
class Reference:
    """A published model. names: of its repositories, the present one first, or of torchvision's builder."""

    title: str
    library: str
    names: tuple[str, ...]
    nicknames: tuple[str, ...]


REFERENCES = (
    Reference(
        "DistilBERT", "transformers", ("distilbert/distilbert-base-uncased", "distilbert-base-uncased"),
        ("distilbert", "distilbert-base"),
    ),
    Reference("T5-small", "transformers", ("google-t5/t5-small", "t5-small"), ("t5",)),
    Reference("MobileNetV2", "torchvision", ("mobilenet_v2",), ("mobilenet",)),
    Reference("ResNet-18", "torchvision", ("resnet18",), ("resnet",)),
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model, where it came from, which revision of it that is, and the file or files of its weights."""

    model: nn.Module
    source: str
    revision: str
    weights: tuple[Path, ...]


def find_reference(name: str) -> Reference | None:
    """The reference model of that name, written in any case and with any punctuation.

    >>> find_reference("mobilenet-V2").title, find_reference("T5 small").names[0], find_reference("gpt")
    ('MobileNetV2', 'google-t5/t5-small', None)
    """
    for reference in REFERENCES:
        called = (reference.title, *reference.names, *reference.nicknames)
        if name.lower() in reference.names or ("/" not in name and _plain(name) in map(_plain, called)):
            return reference
    return None


def unknown_reference(name: str) -> str:
    """Sentence for a name that is none of theirs.

    >>> unknown_reference("distilbart")
    "unknown model 'distilbart': did you mean 'distilbert'? Known: distilbert, mobilenetv2, resnet-18, t5-small."
    """
    return nearest("model", name.lower(), [reference.title.lower() for reference in REFERENCES])


def load_reference(reference: Reference, *, library: Path | None = None, offline: bool = False) -> Loaded:
    """Load a reference model by its own library.

    library: where to look instead of the libraries' own caches and the network: a Hugging Face cache, or a folder of
    model folders (`t5-small/`) and weight files of torchvision (`resnet18-f37072fd.pth`, also in `checkpoints/`).
    offline: the caches only. Weights are safetensors; torchvision's own `.pth` files are read with `weights_only=True`.

    Raises ModelLoadError with the reason.
    """
    if library is not None and not library.is_dir():
        raise ModelLoadError(f"{reference.title} was looked for in {library}, which is not a folder")
    if reference.library == "torchvision":
        return _from_torchvision(reference, library, offline)
    folder = None if library is None else _plain_folder(reference, library)
    source, revision = str(folder), "a local folder, which names none"
    if folder is None:
        source, folder = _from_hub(reference, library, offline)
        revision = folder.name
    weights = tuple(sorted(folder.glob("*.safetensors")))
    if not weights:
        raise ModelLoadError(f"{folder} holds no {WEIGHTS}: weights are read from safetensors only, never unpickled")
    return Loaded(load_saved(folder), source, revision, weights)


def _plain_folder(reference: Reference, library: Path) -> Path | None:
    """A folder of the library that is called like the model and holds one."""
    wanted = {_plain(name.rpartition("/")[2]) for name in (reference.title, *reference.names, *reference.nicknames)}
    folders = (folder for folder in sorted(library.iterdir()) if (folder / CONFIG).is_file())
    return next((folder for folder in folders if _plain(folder.name) in wanted), None)


def _from_hub(reference: Reference, library: Path | None, offline: bool) -> tuple[str, Path]:
    """(repository, its folder in the cache, which is called like the revision)."""
    from huggingface_hub import snapshot_download

    local, reasons = offline or library is not None, []
    for name in reference.names:
        try:
            found = snapshot_download(name, cache_dir=library, local_files_only=local, allow_patterns=list(NEEDED))
            return name, Path(found)
        except Exception as error:  # network, hub and cache errors share no base class
            reasons.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    where = "the Hugging Face cache" if library is None else library
    raise ModelLoadError(
        f"{reference.title} could not be had from {where}{'' if local else ' or the hub'} ({'; '.join(reasons)}); "
        f"fetch it where there is a network, `hf download {reference.names[0]}`, and name the folder as the library"
    )


def _from_torchvision(reference: Reference, library: Path | None, offline: bool) -> Loaded:
    import torch

    name = reference.names[0]
    published = ensure_torchvision().models.get_model_weights(name)
    best = published.DEFAULT
    if library is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / best.url.rpartition("/")[2]
        if path.is_file() or offline:
            model = load_torchvision(name, weights=str(path))
        else:
            model = load_torchvision(name, weights=best.name)
    else:
        folders = (library, library / "checkpoints", library / "hub" / "checkpoints")
        files = [file for folder in folders for end in ("safetensors", "pth") for file in folder.glob(f"{name}*.{end}")]
        if not files:
            raise ModelLoadError(f"{library} holds no weights of {reference.title}, {name}*.safetensors or {name}*.pth")
        path = files[0]
        model = load_torchvision(name, weights=str(path))
    digest = sha256(path)
    by_hash = {entry.url.rpartition("-")[2].removesuffix(".pth"): entry.name for entry in published}
    revision = by_hash.get(digest[:8], "none of torchvision's published weights")
    return Loaded(model.eval(), str(path), revision, (path,))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
