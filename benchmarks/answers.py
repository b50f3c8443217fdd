"""What variants of a classifier answer: kept in a folder, and compared text by text."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.io.files import atomic_write

Row = dict[str, Any]
RESAMPLES = 2000


class Variant(NamedTuple):
    """One line of the table. apply(model, data) changes a model in place and returns the bytes of all its tensors.

    beside: names of the variants that it is held against. peer: it may be missing on this machine. timed: whether a
    call takes the time that the variant stands for. same_layers: whether the model still has its linear layers, with
    weights that can be looked at.
    """

    name: str
    apply: Callable[[nn.Module, DataBundle], int]
    beside: tuple[str, ...] = ()
    peer: bool = False
    timed: bool = True
    same_layers: bool = True


class Kept:
    """What variants answered, log-probabilities float64 [texts, classes] and facts; in a folder, or only in memory."""

    def __init__(self, folder: pathlib.Path | None, identity: Mapping[str, Any]) -> None:
        self.folder, self.found = folder, dict[str, tuple[Tensor, Row]]()
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(identity)
        other = [name for name, value in identity.items() if known.get(name) != value]
        if other:
            raise SystemExit(f"{folder} keeps results of another {', '.join(other)}: choose another folder")
        atomic_write(path, json.dumps(known, indent=2) + "\n")

    def get(self, name: str) -> tuple[Tensor, Row] | None:
        """What is known of a variant."""
        if name not in self.found and self.folder is not None and self._path(name, "json").exists():
            facts = json.loads(self._path(name, "json").read_text(encoding="utf-8"))
            self.found[name] = load_file(self._path(name, "safetensors"))["scores"], facts
        return self.found.get(name)

    def put(self, name: str, scores: Tensor, facts: Row) -> None:
        """Keep a variant; its JSON file is written last."""
        self.found[name] = scores, facts
        if self.folder is not None:
            save_file({"scores": scores.contiguous()}, self._path(name, "safetensors"))
            atomic_write(self._path(name, "json"), json.dumps({"name": name, **facts}, indent=2) + "\n")

    def _path(self, name: str, ending: str) -> pathlib.Path:
        assert self.folder is not None
        return self.folder / f"{re.sub(r'[^a-z0-9.+]+', '-', name.lower()).strip('-')}.{ending}"


def each_text(got: Tensor, want: Tensor) -> dict[str, Tensor]:
    """KL divergence of every text, and whether it flips."""
    flips = (got.argmax(dim=1) != want.argmax(dim=1)).double()
    return {"kl": (want.exp() * (want - got)).sum(dim=1), "flips": flips}


@functools.cache
def draws(texts: int, seed: int) -> Tensor:
    """How often each text is in each resample, float64 [RESAMPLES, texts]."""
    drawn = torch.randint(texts, (RESAMPLES, texts), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, texts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand_as(drawn)
    )


def interval(found: Tensor, baseline: Tensor, *, seed: int) -> tuple[float, float, float] | None:
    """Ratio of the mean of ``found`` to that of ``baseline``, and its 95 % interval; None where the latter is 0."""
    if not float(baseline.sum()) > 0:
        return None
    sums = draws(len(found), seed) @ torch.stack((found, baseline), dim=1)
    ratios = (sums[:, 0] / sums[:, 1]).nan_to_num(nan=1.0, posinf=torch.inf).sort().values
    return float(found.sum() / baseline.sum()), float(ratios[RESAMPLES // 40]), float(ratios[-RESAMPLES // 40])


def points_lost(before: Tensor, after: Tensor, *, seed: int) -> tuple[float, float, float]:
    """Percentage points of accuracy that went, and their 95 % interval. before, after: whether each text is right."""
    lost = 100 * (before.double() - after.double())
    means = (draws(len(lost), seed) @ lost / len(lost)).sort().values
    return float(lost.mean()), float(means[RESAMPLES // 40]), float(means[-RESAMPLES // 40])


def ratios(variant: Variant, kept: Kept, want: Tensor, seed: int) -> Row:
    """Name of another variant -> the intervals of both ratios to it; those that nothing is known of are left out."""
    mine, found = kept.get(variant.name), {}
    assert mine is not None
    for name in variant.beside:
        other = kept.get(name)
        if other is not None:
            pairs = zip(each_text(mine[0], want).items(), each_text(other[0], want).values(), strict=True)
            found[name] = {key: interval(value, base, seed=seed) for (key, value), base in pairs}
    return found
