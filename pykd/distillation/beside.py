"""What is learned beside a student, in a file of its own inside a Trainer's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from pykd.errors import ArtifactError

FILE = "projections.safetensors"


def save_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the modules' parameters to ``folder / FILE``."""
    from safetensors.torch import save_file

    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / FILE)


def load_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Read them back; ArtifactError where the checkpoint has others, or none."""
    from safetensors.torch import load_file

    file = folder / FILE
    found = load_file(file) if file.exists() else {}
    sizes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {f"{name}/{key}": tuple(value.shape) for name, module in modules.items()
              for key, value in module.state_dict().items()}  # fmt: skip
    if sizes != wanted:
        raise ArtifactError(
            f"checkpoint {folder} holds projections {sizes or 'none'}, this training has {wanted or 'none'}: resume "
            "with the method, student and teacher that it was written with"
        )
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
