"""Loading what pykd saved: checksums first, then the structure on the meta device, then the tensors."""

from __future__ import annotations

import importlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io import structure
from pykd.io.manifest import check_version, verify
from pykd.io.save import CONFIG, WEIGHTS
from pykd.io.structure import Structure
from pykd.models import torchvision
from pykd.models.adapter import FAMILIES, without_values
from pykd.nn.compressed import CompressedModule


def from_pretrained(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a folder that `pykd.save_pretrained` wrote, in eval mode, with the logits of the model that was saved.

    Every file is checked against the manifest before anything is read. `model.pykd_report` holds the stages again.
    Nothing is unpickled and no code from the folder is run. Raises ArtifactError for a file that is missing, truncated,
    altered or of a newer format, naming it with what was expected and found.

    >>> import tempfile, pykd
    >>> from pykd.models.torchvision import load_torchvision
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pykd.save_pretrained(load_torchvision("squeezenet1_1", num_classes=3), f"{folder}/model")
    ...     from_pretrained(f"{folder}/model").pykd_origin["name"]
    'squeezenet1_1'
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder. pykd.from_pretrained loads what pykd.save_pretrained wrote; "
            "a model on the hub loads with AutoModelFor....from_pretrained after `import pykd`."
        )
    manifest = verify(folder)
    config = read_config(folder / CONFIG)
    model = _load_torchvision(folder, config) if "pykd" in config else _load_huggingface(folder, config)
    model.pykd_report = manifest["stages"]
    return model.to(device)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a saved folder. Raises ArtifactError if it is absent or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); copy the folder again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds no JSON object; copy the folder again.")
    return content


def read_structure(content: dict[str, Any], where: str) -> Structure:
    """The structure inside a configuration, without the keys that say whose and which version it is."""
    check_version(content, where)
    about = ("quant_method", "format_version", "dtype")
    return Structure.from_dict({key: value for key, value in content.items() if key not in about})


def retie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make each name of `tied` the very tensor that it was stored under."""
    for name, stored in tied.items():
        path, _, key = stored.rpartition(".")
        source = getattr(model.get_submodule(path), key)
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, source)


def finalize(model: nn.Module) -> None:
    """Let every compressed layer make the layout of its device."""
    for module in model.modules():
        if isinstance(module, CompressedModule):
            module.finalize()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ArtifactError if it is truncated or not one.

    They are copied out of the mapped file into memory of their own: the file packs them at odd addresses, for which
    oneDNN chooses other kernels, so that the last bits of the logits would differ from those before saving.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors ({error}); copy the folder again.") from error


def _load_torchvision(folder: Path, config: dict[str, Any]) -> nn.Module:
    where = str(folder / CONFIG)
    described = read_structure(config["pykd"], where)
    origin = config.get("origin")
    if not isinstance(origin, dict) or origin.get("source") != "torchvision":
        raise ArtifactError(f"{where} does not say which torchvision model it is; found the origin {origin!r}.")
    model = without_values(lambda: torchvision.build(origin))
    structure.apply(model, described)
    tensors = OrderedDict(read_tensors(folder / WEIGHTS))
    tensors._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # versions that some layers ask for
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{folder / WEIGHTS} does not fit {where}: {text}; save the model again.") from error
    missing = [name for name in missing if name not in described.tied]
    if missing or unknown:
        raise ArtifactError(
            f"{folder / WEIGHTS} does not fit {where}: {len(missing)} tensors missing, {len(unknown)} unknown "
            f"(first: {[*missing, *unknown][0]!r}); save the model again."
        )
    retie(model, described.tied)
    finalize(model)
    return model.eval()


def _load_huggingface(folder: Path, config: dict[str, Any]) -> nn.Module:
    import transformers

    names = config.get("architectures") or [None]
    family = FAMILIES.get(str(names[0]))
    kind: Any = getattr(importlib.import_module(family) if family else transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ArtifactError(
            f"{folder / CONFIG} names the architecture {names[0]!r}, which transformers {transformers.__version__} "
            "does not have; install a transformers that has it."
        )
    loader: Any = kind
    model, info = loader.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise ArtifactError(f"{folder / WEIGHTS} does not fit {CONFIG}: tensor {wrong[0]!r}; save the model again.")
    loaded: nn.Module = model
    return loaded
