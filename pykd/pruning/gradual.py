"""Gradual pruning: sparsity that rises while a model is trained or distilled, by magnitude or by movement."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pykd.errors import nearest
from pykd.nn.fake_quantized import FakeQuantized, QATConv2d, QATLinear
from pykd.nn.importance import Block, Pattern, magnitude, mask_of_pattern
from pykd.nn.masked import Masked, MaskedConv2d, MaskedLinear
from pykd.nn.selection import as_linear, replace_layer
from pykd.nn.sparse_conv import SparseConv2d
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning.options import check_prune
from pykd.pruning.outcome import Request
from pykd.pruning.random_weights import random_scores
from pykd.pruning.weights import masks_of, select_weights
from pykd.training.record import recorded_change

#: Methods whose scores are there at every step.
GRADUAL = ("magnitude", "movement", "random")


def cubic_sparsity(progress: float, *, initial: float, final: float) -> float:
    """``final + (initial - final) * (1 - progress)^3`` (Zhu and Gupta 2017, eq. 1): fast at first.

    >>> [round(cubic_sparsity(p, initial=0.0, final=0.8), 2) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.46, 0.7, 0.8]
    """
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


@dataclass(frozen=True)
class Gradual:
    """Pruning while ``fit``, ``finetune`` or ``distill`` train, as their option ``prune``.

    Every ``every`` steps the masks follow the scores as they are then, with the sparsity of `cubic_sparsity` between
    the shares ``begin`` and ``end`` of all steps; from ``end`` on the masks stay and the rest recovers. Masked weights
    get no gradient. At the end of the training layers become SparseLinear and SparseConv2d, as after `prune`; between
    `prepare_qat` and `convert_qat` the layers stay what they are, and are packed without what went. A guard
    compares only models of the final sparsity: before ``end`` it holds the newest state, should training diverge.

    method: "magnitude", "random": what went never returns. "movement": scores learn beside the weights (Sanh et al.
    2020), rise where training moves a weight away from zero, and weights may return until ``end``. sparsity, scope,
    pattern, include, exclude, seed: as for `prune`; scope "global" unless told otherwise. initial: sparsity at
    ``begin``.

    Raises ValueError for an unknown method, options that do not go with it, and numbers out of range.

    >>> Gradual(sparsity=0.8, method="movement").sparsity
    0.8
    """

    method: str = "magnitude"
    sparsity: float | None = None
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.7
    every: int = 10
    scope: str | None = None
    pattern: str | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in GRADUAL:
            raise ValueError(nearest("method of gradual pruning", self.method, GRADUAL))
        final = self.request.sparsity
        if isinstance(self.request.pattern, Block):
            raise ValueError(
                f"gradual pruning takes patterns N:M, as '2:4', got {self.pattern!r}; prune() takes blocks"
            )
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"begin and end are shares of the steps, 0 <= begin < end <= 1, got {self.begin}, {self.end}"
            )
        if not 0 <= self.initial <= final:
            raise ValueError(f"initial is a sparsity between 0 and the final {final:g}, got {self.initial!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of steps, at least 1, got {self.every!r}")

    @property
    def request(self) -> Request:
        """What is to be reached, as the methods of `prune` are told."""
        known = "magnitude" if self.method == "movement" else self.method
        share, pattern = check_prune(known, self.sparsity, scope=self.scope, pattern=self.pattern)
        return Request(share, self.include, self.exclude, scope=self.scope, pattern=pattern, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)

    def attach(self, model: nn.Module) -> None:
        """Put maskable layers in the place of those that `prune` would choose; those that `prepare_qat` made get masks.

        Raises ValueError for movement on the latter.
        """
        names: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "pattern": self.request.pattern}
        chosen = select_weights(model, **names, others=(QATLinear, QATConv2d)).chosen
        rounded = [layer for layer in chosen.values() if isinstance(layer, FakeQuantized)]
        if rounded and self.method == "movement":
            raise ValueError(
                "method 'movement' learns scores beside the weights, for which layers of quantization-aware training "
                "have no place: take 'magnitude', or prune before prepare_qat"
            )
        for layer in chosen.values():
            if isinstance(layer, FakeQuantized):
                layer.kept = torch.ones_like(layer.weight, dtype=torch.bool) if layer.kept is None else layer.kept
            else:
                replace_layer(model, layer, _masked(layer, learn_scores=self.method == "movement"))

    @torch.no_grad()
    def step(self, model: nn.Module, number: int, total: int) -> dict[str, float]:
        """Set the masks of step ``number`` when they are due; the sparsity of all maskable layers together."""
        first, last = round(self.begin * total), self._last(total)
        layers = _maskable(model)
        if number == last or (first <= number < last and (number - first) % self.every == 0):
            progress = (number - first) / (last - first) if last > first else 1.0
            share = cubic_sparsity(progress, initial=self.initial, final=self.request.sparsity)
            scores = {name: self._scores(name, layer) for name, layer in layers.items()}
            never = {name: matrix == -torch.inf for name, matrix in scores.items()}
            for name, mask in self._masks(scores, share).items():
                layers[name].mask.copy_((mask & ~never[name]).view_as(layers[name].mask))
        weights = sum(layer.mask.numel() for layer in layers.values())
        return {"sparsity": 1 - float(sum(layer.mask.sum() for layer in layers.values())) / weights}

    def settled(self, steps: int, total: int) -> bool:
        """Whether the masks are the final ones once so many steps of ``total`` are done.

        >>> [Gradual(end=0.5).settled(steps, 10) for steps in (5, 6)]
        [False, True]
        """
        return steps > self._last(total)

    def _last(self, total: int) -> int:
        """The step, from 0, that sets the final masks."""
        return min(round(self.end * total), total - 1)

    def detach(self, model: nn.Module) -> None:
        """Make the maskable layers sparse, or dense again where nothing went; in ``pykd_report`` if anything went.

        Layers of quantization-aware training keep their masks until `convert_qat` packs them.
        """
        layers = _maskable(model)
        pruned = {name: layer for name, layer in layers.items() if not bool(layer.mask.all())}
        for layer in layers.values():
            if isinstance(layer, FakeQuantized):
                layer.kept = layer.kept if layer in pruned.values() else None
                continue
            layer.scores = None  # they have done their work, and are no weights to be counted
            if layer not in pruned.values():
                replace_layer(model, layer, _converted(layer).to_dense())
        if not pruned:
            return
        skipped = {name: "none of its weights is among those that go" for name in layers if name not in pruned}
        parameters = self.to_dict() | {"sparsity": self.request.sparsity}
        with recorded_change(model, stage="prune", method=f"gradual {self.method}", parameters=parameters) as facts:
            facts.update(changed={}, skipped=skipped)
            for name, layer in pruned.items():
                facts["changed"][name] = {"sparsity": round(1 - layer.mask.float().mean().item(), 4)}
                if isinstance(layer, Masked):
                    replace_layer(model, layer, _converted(layer))
                else:
                    layer._pruned()

    def _scores(self, name: str, layer: Masked | FakeQuantized) -> Tensor:
        """Scores of a weight matrix; below all others where a weight is gone for good."""
        weight = layer.weight.detach().flatten(1)
        if isinstance(layer, Masked) and layer.scores is not None:
            return layer.scores.detach().float().flatten(1).masked_fill(weight == 0, -torch.inf)
        if self.method == "random":
            scores = random_scores(weight, seed=self.seed + zlib.crc32(name.encode()))
        else:
            scores = magnitude(weight)
        return scores.masked_fill(~layer.mask.flatten(1), -torch.inf)

    def _masks(self, scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        request = self.request
        if isinstance(request.pattern, Pattern):  # of those that the pattern will remove, the weakest go first
            for name, matrix in scores.items():
                scores[name] = matrix.masked_fill(mask_of_pattern(matrix, request.pattern), torch.inf)
        now = Request(share, scope=self.scope)
        return masks_of(scores, now, scope=self.scope or "global")


def _maskable(model: nn.Module) -> dict[str, Masked | FakeQuantized]:
    """The layers that were attached to, by name."""
    found: dict[str, Masked | FakeQuantized] = {}
    for name, module in model.named_modules():
        if isinstance(module, Masked) or (isinstance(module, FakeQuantized) and module.kept is not None):
            found[name] = module
    return found


def _masked(layer: nn.Module, *, learn_scores: bool) -> MaskedLinear | MaskedConv2d:
    mask = None
    if isinstance(layer, (SparseLinear, SparseConv2d)):
        mask, layer = layer.mask, layer.to_dense()
    dense = as_linear(layer)
    if isinstance(dense, nn.Conv2d):
        return MaskedConv2d.from_conv2d(dense, mask=mask, learn_scores=learn_scores)
    return MaskedLinear.from_linear(cast(nn.Linear, dense), mask=mask, learn_scores=learn_scores)


def _converted(layer: Masked) -> SparseLinear | SparseConv2d:
    assert isinstance(layer, (MaskedLinear, MaskedConv2d))
    return layer.convert()
