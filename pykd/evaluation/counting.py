"""How big a model is: weights it stands for, weights that are not zero, bytes in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.nn.compressed import CompressedModule
from pykd.nn.tied import Tied

#: Tensors in which compressed layers store the weight that `dequantize` returns.
STORED_WEIGHT = {"qweight", "scales", "zeros", "bitmask", "qvalues", "values"}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters, non-zero parameters) of a model, each tied tensor counted once.

    A compressed layer counts as the dense layer that it computes: a 4-bit Linear has out * in weights, and those whose
    code stands for zero are zeros, whatever scales and bitmasks it stores besides. A layer tied to a compressed
    embedding counts its bias alone.

    >>> count_parameters(nn.Linear(4, 3))[0]
    15
    """
    total = nonzero = 0
    seen: set[int] = set()
    for module in model.modules():
        stored = STORED_WEIGHT if isinstance(module, CompressedModule) else set()
        if isinstance(module, CompressedModule) and not isinstance(module, Tied):
            weight = module.dequantize()
            total += weight.numel()
            nonzero += _nonzero(weight)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or name in stored:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            nonzero += _nonzero(parameter)
    return total, nonzero


def saved_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of the weights of a saved model: a file, or the .safetensors files of a folder.

    Raises ArtifactError when there are none.
    """
    found = Path(path)
    files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"{found} holds no saved model (no .safetensors file); give the folder it was saved to")
    return sum(file.stat().st_size for file in files)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the .safetensors file that a model's state makes, written to a temporary folder; tied tensors once."""
    from safetensors.torch import save_file

    distinct: dict[str, Tensor] = {}
    keys: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in keys:
            keys.add(key)
            distinct[name] = tensor.detach().cpu().contiguous().clone()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(distinct, file, metadata={"format": "pt"})
        return file.stat().st_size


def _nonzero(tensor: Tensor) -> int:
    return int(tensor.detach().count_nonzero())
