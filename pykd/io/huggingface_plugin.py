"""The quantizer "pykd" of transformers: `AutoModelFor....from_pretrained` on a folder that pykd saved.

Importing this module registers it; pykd.io.import_hook does so once transformers.quantizers.auto has been imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pykd.errors import ArtifactError
from pykd.io import structure
from pykd.io.load import finalize, read_structure, retie
from pykd.io.manifest import MANIFEST, verify
from pykd.io.save import CONFIG, quantization_config, snapshot
from pykd.io.structure import Structure
from pykd.nn.compressed import CompressedModule


class PykdConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of config.json: the structure of a compressed model."""

    def __init__(self, **content: Any) -> None:
        self.quant_method = "pykd"
        self.structure = read_structure(content, f"quantization_config in {CONFIG}")
        self.dtype = str(content.get("dtype"))

    def to_dict(self) -> dict[str, Any]:
        return quantization_config(self.structure, self.dtype)


class PykdQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives the skeleton the saved structure before transformers fills in the tensors, and finalizes it afterwards."""

    requires_calibration = True  # nothing is quantized on the fly: pykd.quantize does that

    def __init__(self, config: PykdConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.requested: torch.dtype | None = None
        self.exact: set[str] = set()
        self.stages: list[dict[str, Any]] | None = None

    # Before the tensors are read.

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.requested = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if folder is not None and (folder / MANIFEST).is_file():
            self.stages = verify(folder)["stages"]
        described = fitted(self.quantization_config.structure, model)
        structure.apply(model, described)
        self.tied = described.tied
        self.exact = {
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            if isinstance(module, CompressedModule)
            for key, _ in module.named_buffers()
        }
        files = checkpoint_files or []
        stored = _stored_shapes(files)
        own = model.state_dict()
        declared = {k: v for k, v in model.all_tied_weights_keys.items() if k in own and k not in stored}
        model.all_tied_weights_keys = {**declared, **described.tied}
        if stored and type(model).__name__ in (model.config.architectures or []):
            _check_stored(stored, own, set(model.all_tied_weights_keys), files)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Stored dtypes stay if the model is loaded in its own; packed weights and scales always keep theirs."""
        if self._as_stored() or converter.target_patterns[0] in self.exact:
            return None
        cast: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return cast

    # After they have been read.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # else .half(), .float() and Trainer refuse what the layers can do by themselves
        retie(model, self.tied)
        for module in model.modules():
            if isinstance(module, CompressedModule) and not self._as_stored():
                module.to(self.requested)
        finalize(model)
        if self.stages is not None:
            model.pykd_report = self.stages
        return model

    def _as_stored(self) -> bool:
        return f"torch.{self.quantization_config.dtype}" == str(self.requested)

    # What may be done with the model then.

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For `model.save_pretrained`: the structure as it is now goes into the configuration."""
        described, tensors = snapshot(model)
        config = PykdConfig(**quantization_config(described, str(model.dtype).removeprefix("torch.")))
        self.quantization_config = model.config.quantization_config = config
        return tensors, {}


def fitted(described: Structure, model: Any) -> Structure:
    """The structure with its names as `model` has them, when it has another head than the model that was saved.

    A base model is `bert.encoder...` inside a model with a head, and `encoder...` alone. What `model` does not have at
    all belongs to the other head and is left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    alone = not hasattr(model, model.base_model_prefix)

    def place(name: str) -> str:
        if alone and f"{name}.".startswith(prefix):
            return name[len(prefix) :]
        return name if alone or _exists(modules, name) or not _exists(modules, prefix + name) else prefix + name

    def keep(name: str) -> bool:
        return _exists(modules, place(name))

    return Structure(
        modules={place(k): v for k, v in described.modules.items() if keep(k)},
        attributes={place(k): v for k, v in described.attributes.items() if keep(k)},
        shapes={place(k): v for k, v in described.shapes.items() if keep(k)},
        removed=[place(k) for k in described.removed if keep(k)],
        tied={place(k): place(v) for k, v in described.tied.items() if keep(k) and keep(v)},
        sources={place(k): place(v) for k, v in described.sources.items() if keep(k) and keep(v)},
    )


def _exists(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether there is such a module, or one that could have such a child or tensor."""
    return name in modules or name.rpartition(".")[0] in modules


def _stored_shapes(files: list[str]) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                shapes.update({key: content.get_slice(key).get_shape() for key in content.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read as safetensors ({error}); copy the folder again.") from error
    return shapes


def _check_stored(stored: dict[str, list[int]], own: dict[str, Tensor], tied: set[str], files: list[str]) -> None:
    for name, value in own.items():
        found = stored.get(name)
        if found != list(value.shape) and not (found is None and name in tied):
            raise ArtifactError(
                f"{files[0]} does not fit its {CONFIG}: tensor {name!r} should have shape {list(value.shape)}, "
                f"found {found or 'no such tensor'}; save the model again."
            )


def register() -> None:
    """Tell transformers about the quantizer "pykd". Does nothing the second time."""
    if "pykd" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("pykd")(PykdConfig)
        register_quantizer("pykd")(PykdQuantizer)


register()
