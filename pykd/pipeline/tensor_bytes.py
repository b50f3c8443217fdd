"""What a stage did to the bytes of the very tensors that it touched, from the files before and after."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pykd.io.save import WEIGHTS


class TensorBytes(NamedTuple):
    """Bytes of the tensors of some layers in one file and in the next; biases and whatever else they hold included."""

    layers: int
    before: int
    after: int

    @property
    def smaller(self) -> float:
        """Share of the bytes that is gone."""
        return 1 - self.after / self.before

    def sentence(self, name: str) -> str:
        """In words.

        >>> TensorBytes(2, 4000, 3500).sentence("prune")
        'prune: the tensors of its 2 layers take 12.5 % less on disk, 0.00 MB -> 0.00'
        """
        less = f"{abs(100 * self.smaller):.1f} % {'less' if self.smaller >= 0 else 'more'}"
        size = f"{self.before / 1e6:,.2f} MB -> {self.after / 1e6:,.2f}"
        return f"{name}: the tensors of its {self.layers} layers take {less} on disk, {size}"


def tensor_bytes(before: Path, after: Path, layers: Iterable[str]) -> TensorBytes | None:
    """Of two folders of saved models; layers: by name. None where none of them has tensors in both."""
    sizes = [_by_layer(folder / WEIGHTS) for folder in (before, after)]
    known = [layer for layer in layers if all(layer in size for size in sizes)]
    if not known:
        return None
    return TensorBytes(len(known), *(sum(size[layer] for layer in known) for size in sizes))


def _by_layer(file: Path) -> dict[str, int]:
    """Bytes of the tensors that each layer holds itself."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_tensor(name)
            layer = name.rpartition(".")[0]
            found[layer] = found.get(layer, 0) + tensor.numel() * tensor.element_size()
    return found
