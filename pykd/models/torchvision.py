"""torchvision models, built by torchvision's own registry with its own weights, that remember how they were built."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ModelLoadError, nearest

#: Operators whose schemas torchvision's Python code needs at import, even where its compiled part cannot be loaded.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@contextlib.contextmanager
def missing_schemas() -> Iterator[None]:
    """Define the schemas of torchvision's operators that are absent, and take them back at the end.

    The published wheels of torchvision are compiled against a CUDA torch. Beside a CPU-only torch their operators are
    not there, and `import torchvision` fails where it describes them (`torchvision/_meta_registrations.py`). Nothing
    is defined where the real operators exist, and nothing stays behind, so that they can be registered later on.
    """
    absent = [schema for name, schema in SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        for schema in absent:
            library.define(schema)
        yield


def ensure_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    `import pykd` has installed the hook that makes the import work (pykd.io.import_hook). Raises ModelLoadError where
    torchvision is not installed or does not import for another reason.

    >>> ensure_torchvision().__name__
    'torchvision'
    """
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise ModelLoadError(
            f"torchvision cannot be imported ({error}); install the release that fits torch {torch.__version__}: "
            "pip install 'pykd[vision]'."
        ) from error
    module: ModuleType = torchvision
    return module


def load_torchvision(
    name: str, num_classes: int | None = None, weights: str | os.PathLike[str] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a torchvision model by its registered name, optionally with weights, and note its origin on it.

    `weights` is None (random initialisation, by torchvision), the path of a local state dict (`.safetensors`, or
    torchvision's own `.pth`, which is read with `weights_only=True`), or the name of an official set of weights
    ("DEFAULT", "IMAGENET1K_V1"), which torchvision's own code downloads. `num_classes` other than that of the weights
    keeps the new head as it was initialised. `kwargs` go to torchvision's builder and must be JSON values, since
    `model.pykd_origin = {"source": "torchvision", "name": name, "kwargs": {...}}` is how a saved model is rebuilt.
    Raises ModelLoadError, which says which model, from where, why, and how to supply a local file.

    >>> load_torchvision("resnet18", num_classes=10).pykd_origin["kwargs"]
    {'num_classes': 10}
    """
    models = ensure_torchvision().models
    if name not in models.list_models():
        similar = difflib.get_close_matches(name, models.list_models(), n=5, cutoff=0.3) or models.list_models()
        raise ModelLoadError(f"torchvision has no such model: {nearest('model', name, similar)}")
    options = {**kwargs} if num_classes is None else {"num_classes": num_classes, **kwargs}
    origin = {"source": "torchvision", "name": name, "kwargs": options}
    model = build(origin)
    if weights is not None:
        _load_weights(model, name, weights, models)
    return model


def build(origin: dict[str, Any]) -> nn.Module:
    """The randomly initialised model that `origin` describes, on the default device (so also on "meta").

    >>> build({"source": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 7}}).fc.out_features
    7
    """
    models = ensure_torchvision().models
    name, kwargs = origin["name"], origin["kwargs"]
    try:
        json.dumps(kwargs)
        parameters = inspect.signature(models.get_model_builder(name)).parameters
        without = {key: None for key in ("weights", "weights_backbone") if key in parameters}  # nothing is downloaded
        model: nn.Module = models.get_model(name, **without, **kwargs)
    except (TypeError, ValueError) as error:
        raise ModelLoadError(
            f"torchvision's {name!r} cannot be built with {kwargs!r}: {error}. "
            "Pass what its builder takes, as JSON values."
        ) from error
    model.pykd_origin = origin  # type: ignore[assignment]
    return model


def _load_weights(model: nn.Module, name: str, weights: str | os.PathLike[str], models: Any) -> None:
    path = os.fspath(weights)
    if os.path.exists(path) or os.sep in path or path.endswith((".pth", ".pt", ".safetensors")):
        state, where = _read_state(name, path), path
    else:
        state, where = _official_state(name, path, models), f"torchvision's {path}"
    own = model.state_dict()
    other_head = {
        key for key, value in state.items() if key in own and value.shape != own[key].shape and _is_head(model, key)
    }
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    wrong = sorted(k for k in state.keys() & own.keys() - other_head if state[k].shape != own[k].shape)
    if missing or unknown or wrong:
        raise ModelLoadError(
            f"{where} does not hold weights of torchvision's {name!r}: {len(missing)} tensors missing, {len(unknown)} "
            f"unknown, {len(wrong)} of another shape (first: {(missing + unknown + wrong)[0]!r}); "
            "pass weights= of that model."
        )
    model.load_state_dict({key: value for key, value in state.items() if key not in other_head}, strict=False)


def _is_head(model: nn.Module, key: str) -> bool:
    """Whether `key` belongs to the last layer that has one output per class."""
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return layers[-1:] == [key.rpartition(".")[0]]


def _read_state(name: str, path: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:  # whatever the reader raises: the file is not what it must be
        raise ModelLoadError(
            f"weights of torchvision's {name!r} cannot be read from {path} ({error}); "
            "expected a state dict in a .safetensors or .pth file."
        ) from error


def _official_state(name: str, weights: str, models: Any) -> dict[str, Tensor]:
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ModelLoadError(
            f"torchvision has no such weights for {name!r}: {nearest('weights', weights, known.__members__)} "
            "A local state dict is given by its path: weights='/path/to/weights.pth'."
        )
    entry = known[weights]
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return state
    except Exception as error:  # no network, a refused download, a broken cache: one sentence for all of them
        raise ModelLoadError(
            f"weights {weights!r} of torchvision's {name!r} could not be had from {entry.url} ({error}); "
            "download that file elsewhere and pass its path: weights='/path/to/weights.pth'."
        ) from error
