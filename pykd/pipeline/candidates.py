"""The models that `compress_to` looks at: depth x pruning x bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pykd.data import DataBundle
from pykd.models.layers import layer_stacks
from pykd.models.students import derive
from pykd.pruning import prune

#: Method and sparsity, as `prune` takes them; None prunes nothing.
Pruning = tuple[str, float] | None


@dataclass(frozen=True)
class Candidate:
    """A model made of the given one: ``depth`` layers are kept (None: all), then pruned, then stored in ``scheme``."""

    depth: int | None = None
    pruning: Pruning = None
    scheme: str | None = None

    @property
    def structure(self) -> Candidate:
        """The same without quantization: what is trained, once for all schemes."""
        return Candidate(self.depth, self.pruning)

    @property
    def trained(self) -> bool:
        """Whether anything was removed that training can make up for."""
        return self.depth is not None or self.pruning is not None

    @property
    def name(self) -> str:
        """In words.

        >>> Candidate(3, ("neurons", 0.3), "w4a16").name, Candidate().name
        ('3 layers, neurons 30 %, w4a16', 'as it is')
        """
        pruned = None if self.pruning is None else f"{self.pruning[0]} {100 * self.pruning[1]:g} %"
        depth = None if self.depth is None else f"{self.depth} layers"
        return ", ".join(part for part in (depth, pruned, self.scheme) if part) or "as it is"

    @property
    def key(self) -> str:
        """The name as that of a file."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.replace("%", "")).strip("-")


def space(
    model: nn.Module,
    depths: Sequence[int | None] | None,
    prunings: Sequence[Pruning] | None,
    schemes: Sequence[str | None],
) -> list[Candidate]:
    """Every combination but the model as it is; by default two thirds, half and a third of a transformer's layers.

    Raises ValueError when there is none.
    """
    depths = default_depths(model) if depths is None else depths
    prunings = default_prunings(model) if prunings is None else prunings
    pairs = [None if pair is None else (str(pair[0]), float(pair[1])) for pair in prunings]
    found = [Candidate(depth, pair, scheme) for depth in depths for pair in pairs for scheme in schemes]
    found = [candidate for candidate in dict.fromkeys(found) if candidate != Candidate()]
    if not found:
        raise ValueError("depths, prunings and schemes leave no candidate but the model as it is: give one more")
    return found


def default_depths(model: nn.Module) -> list[int | None]:
    """All layers, and two thirds, half and a third of those of a transformer.

    >>> default_depths(nn.Linear(2, 2))
    [None]
    """
    layers = min((len(stack) for stack in layer_stacks(model).values()), default=1)
    shares = dict.fromkeys(-(-layers * part // whole) for part, whole in ((2, 3), (1, 2), (1, 3)))
    return [None, *(count for count in shares if count < layers)]


def default_prunings(model: nn.Module) -> list[Pruning]:
    """Nothing, and twice what makes this kind of model smaller."""
    if layer_stacks(model):
        return [None, ("neurons", 0.3), ("magnitude", 0.5)]
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return [None, ("channels", 0.3), ("channels", 0.5)]
    return [None, ("magnitude", 0.5), ("magnitude", 0.7)]


def build(model: nn.Module, structure: Candidate, data: DataBundle, *, seed: int) -> nn.Module:
    """A copy with layers taken out and weights pruned, not yet trained. Raises ValueError as the verbs do."""
    made = derive(model, depth=structure.depth) if structure.depth is not None else copy.deepcopy(model)
    if structure.pruning is not None:
        method, sparsity = structure.pruning
        options: dict[str, Any] = {"example": data.example(2)}
        if method in ("wanda", "sparsegpt"):
            options |= {"data": data, "seed": seed}
        prune(made, method, sparsity, **options)
    return made
