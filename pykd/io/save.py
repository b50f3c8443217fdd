"""Saving: a folder with a configuration, one safetensors file and a manifest, written whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pykd.errors import ArtifactError, nearest
from pykd.io import structure
from pykd.io.card import CARD, model_card
from pykd.io.export.dense import densify
from pykd.io.files import atomic_directory, check_vacant
from pykd.io.manifest import FORMAT_VERSION, owned, write_manifest
from pykd.io.structure import Structure
from pykd.models.adapter import FAMILIES, origin, skeleton, unwrap

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
#: What `save_pretrained` writes: packed layers, or ordinary ones.
SAVED = ("pykd", "dense")


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    format: str = "pykd",
) -> Path:
    """Save a model, dense or compressed, so that `pykd.from_pretrained(path)` returns one with identical logits.

    The folder holds `config.json`, `model.safetensors` (packed weights, pruned shapes, tied weights once, no pickle),
    `pykd_manifest.json` (checksums, versions, `provenance`, and the stages in `model.pykd_report`), `README.md` (the
    model card that hubs show) and the files of `tokenizer` and `processor`. A Hugging Face model also loads with
    `AutoModelFor....from_pretrained(path)` once pykd is imported; if nothing was compressed, even without pykd (but for
    pykd's own families). The model is not changed. Returns the path.

    format: "pykd", or "dense" for an ordinary checkpoint that nobody needs pykd for: weights dequantized, pruned ones
    zero, layers with widths of their own filled up with zeros (`pykd.io.export.dense.densify`, which also says what it
    refuses). A torchvision model's file is then a state dict; the README says how to load it.

    Raises ArtifactError if the path holds something else (or a saved model, without `overwrite`), if the disk is
    full, or if the model has a layer that cannot be described; nothing is half-written.

    >>> import tempfile
    >>> from pykd.models.torchvision import load_torchvision
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_pretrained(load_torchvision("squeezenet1_1", num_classes=3), f"{folder}/model")
    ...     sorted(os.listdir(path))
    ['README.md', 'config.json', 'model.safetensors', 'pykd_manifest.json']
    """
    if format not in SAVED:
        raise ArtifactError(f"{nearest('format', format, SAVED)} Others are written by `pykd.export`.")
    path = Path(path)
    check_vacant(path, overwrite=overwrite, owned=owned)
    model = densify(model) if format == "dense" else unwrap(model)
    described, tensors = snapshot(model)
    with atomic_directory(path, overwrite=overwrite, owned=owned) as folder:
        if origin(model)["source"] == "huggingface":
            compressed = needs_plugin(model, described, tensors) or type(model).__name__ in FAMILIES
            _write_huggingface_config(model, described, tensors, folder)
        else:
            compressed = described.changes()
            content = {"pykd": {"format_version": FORMAT_VERSION, **described.to_dict()}, "origin": origin(model)}
            (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tensors(tensors, folder / WEIGHTS)
        for companion in (tokenizer, processor):
            if companion is not None:
                companion.save_pretrained(folder)
        about: dict[str, Any] = {"provenance": provenance or {}, "stages": getattr(model, "pykd_report", [])}
        card = model_card(model, **about, compressed=compressed, name=path.absolute().name)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_manifest(folder, **about)
    return path


def snapshot(model: nn.Module) -> tuple[Structure, dict[str, Tensor]]:
    """What a file must hold: the model's difference to its skeleton, and its tensors, each stored once.

    Raises ArtifactError if the skeleton with that difference applied would not take exactly these tensors.
    """
    fresh = skeleton(model)
    described = structure.difference(model, fresh)
    state = model.state_dict()
    structure.apply(fresh, described)
    _check_same(state, fresh.state_dict())
    declared = set(getattr(model, "all_tied_weights_keys", {}))
    tied = structure.shared(state, declared)
    tensors = {name: value for name, value in state.items() if name not in tied}
    return dataclasses.replace(described, tied=tied), tensors


def _check_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{name!r} in the model's state is a {type(value).__name__}; only tensors are saved.")
        if name not in expected or expected[name].shape != value.shape:
            wanted = tuple(expected[name].shape) if name in expected else "nothing"
            raise ArtifactError(
                f"tensor {name!r} of shape {tuple(value.shape)} would not reload: the model's configuration has "
                f"{wanted} there. Undo wrappers and parametrizations before saving."
            )
    for name in expected:
        if name not in state:
            raise ArtifactError(
                f"tensor {name!r} of the model's configuration is not in the model; "
                "undo wrappers and parametrizations before saving."
            )


def _write_huggingface_config(model: Any, described: Structure, tensors: dict[str, Tensor], folder: Path) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if needs_plugin(model, described, tensors):
        config.quantization_config = quantization_config(described, dtype)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def needs_plugin(model: Any, described: Structure, tensors: dict[str, Tensor]) -> bool:
    """Whether transformers alone would not rebuild the model: other layers, other ties, several floating dtypes."""
    ties = set(getattr(model, "all_tied_weights_keys", {}))
    mixed = any(value.is_floating_point() and value.dtype != model.dtype for value in tensors.values())
    return described.changes() or set(described.tied) != ties or mixed


def quantization_config(described: Structure, dtype: str) -> dict[str, Any]:
    """The entry of config.json that makes transformers call pykd's quantizer."""
    return {"quant_method": "pykd", "format_version": FORMAT_VERSION, "dtype": dtype, **described.to_dict()}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, in which tensors that share memory are copies."""
    from safetensors.torch import save_file

    storages: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in storages:  # a view into a tensor that is stored already: the file has no views
            value = value.clone()
        storages.add(storage)
        separate[name] = value
    save_file(separate, path, metadata={"format": "pt"})
