"""What removing single weights costs a trained text classifier, by method, on texts it was not trained on.

    python benchmarks/bench_pruning_methods.py --model FOLDER --data FILE.parquet --texts 3000 --samples 256

Model, data, texts and the columns KL, flips and accuracy as in `bench_quantization_methods.py`, beside which this file
lies. No training: every method sees at most the calibration texts, without labels. The peers, Wanda (Sun et al. 2023)
and SparseGPT (Frantar and Alistarh 2023), are the papers' algorithms written here once more, layer after layer behind
the pruned ones, by the same texts. The last column is the ratio of a variant's mean KL to that of textbook SparseGPT at
the same sparsity, with the 95 % interval of a bootstrap over the texts (paired: both means are of the same texts).
`--json FILE` also writes the numbers and the environment.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from bench_quantization_methods import Row, row, run, scores, subjects
from torch import Tensor, nn

from pykd.calibration import Inputs, calibrate, calibration_batches
from pykd.data import DataBundle
from pykd.pruning import prune
from pykd.pruning.weights import select_weights

#: Methods of `prune`, and the patterns that some of them are measured with.
METHODS = ("random", "magnitude", "wanda", "sparsegpt")
PATTERNS = ("2:4", "1:4")
BASELINE = "textbook sparsegpt"
RESAMPLES = 2000

#: (weight, statistics of its inputs, sparsity) -> pruned weight
Peer = Callable[[Tensor, Inputs, float], Tensor]


def textbook_wanda(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    """Within each output the smallest ``|w| * ||x||`` go."""
    metric = weight.abs() * inputs.hessian[0].diagonal().sqrt()
    threshold = metric.sort(dim=1).values[:, round(sparsity * weight.shape[1]) - 1]
    return weight * (metric > threshold[:, None])


def textbook_sparsegpt(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    """Blocks of 128 columns, damping of 1 % of the mean diagonal, one sweep."""
    hessian, weight = inputs.hessian[0].clone(), weight.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for first in range(0, weight.shape[1], 128):
        part = slice(first, min(first + 128, weight.shape[1]))
        block, corner = weight[:, part].clone(), upper[part, part]
        cost = block.square() / corner.diagonal().square()
        gone = cost <= cost.flatten().kthvalue(max(1, int(sparsity * cost.numel()))).values
        errors = torch.zeros_like(block)
        for column in range(block.shape[1]):
            kept = block[:, column].masked_fill(gone[:, column], 0)
            errors[:, column] = (block[:, column] - kept) / corner[column, column]
            block[:, column:] -= errors[:, column, None] * corner[column, column:]
            block[:, column] = kept
        weight[:, part] = block
        weight[:, part.stop :] -= errors @ upper[part, part.stop :]
    return weight


PEERS: dict[str, Peer] = {"textbook wanda": textbook_wanda, BASELINE: textbook_sparsegpt}


def apply_peer(model: nn.Module, peer: Peer, data: DataBundle, sparsity: float, settings: argparse.Namespace) -> None:
    """Prune the layers that `prune` would, layer after layer behind the pruned ones."""

    def visit(name: str, inputs: Inputs) -> None:
        weight: Any = model.get_submodule(name).weight
        weight.copy_(peer(weight.detach(), inputs, sparsity))

    texts = calibration_batches(data, samples=settings.samples, batch_size=settings.batch_size, seed=settings.seed)
    calibrate(model, list(select_weights(model).chosen), texts, visit)


def variants(settings: argparse.Namespace, data: DataBundle) -> Iterator[tuple[str, str, Callable[[nn.Module], Any]]]:
    """Name, sparsity or pattern, and a function that prunes a model in place; the baseline of each sparsity first."""
    options: dict[str, Any] = {"data": data, "samples": settings.samples, "batch_size": settings.batch_size}
    options["seed"] = settings.seed
    for sparsity in settings.sparsity:
        for name in reversed(PEERS):
            yield (
                name,
                f"{sparsity:g}",
                lambda model, name=name, share=sparsity: apply_peer(model, PEERS[name], data, share, settings),  # type: ignore[misc]
            )
        for method in METHODS:
            yield (
                f"pykd {method}",
                f"{sparsity:g}",
                lambda model, method=method, share=sparsity: prune(model, method, share, **options),  # type: ignore[misc]
            )
    for pattern in PATTERNS:
        for method in METHODS[1:]:
            yield (
                f"pykd {method}",
                pattern,
                lambda model, method=method, pattern=pattern: prune(model, method, pattern=pattern, **options),  # type: ignore[misc]
            )


def interval(found: Tensor, baseline: Tensor, *, seed: int) -> tuple[float, float, float]:
    """Ratio of the mean of ``found`` to that of ``baseline``, with its 95 % interval: a paired bootstrap over texts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(found), (RESAMPLES, len(found)), generator=generator)
    ratios = (found[drawn].mean(dim=1) / baseline[drawn].mean(dim=1)).sort().values
    return float(found.mean() / baseline.mean()), float(ratios[RESAMPLES // 40]), float(ratios[-RESAMPLES // 40])


def line(found: Row, texts: int) -> str:
    """One line of the table."""
    flips = f"{found['flips']} ({found['flips'] / texts:.2%})"
    ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*found["ratio"]) if found["ratio"] else "-"
    cells = (found["name"], found["share"], f"{found['kl']:.5f}", flips, f"{found['accuracy']:.2%}", ratio)
    return f"| {' | '.join(cells)} | {found['prune_s']:.1f} |"


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Every variant that the patterns of `--only` admit, printed as it is measured."""
    model, data, texts, labels = subjects(settings)
    want = scores(model, data, texts, settings.batch_size)
    rows = [row("as it is", want, want, labels, share="0", ratio=None, prune_s=0.0)]
    print(f"{len(texts)} texts, {settings.samples} samples\n")
    print("| method | sparsity | KL | flips | accuracy | KL / textbook's | s |\n|---|---:|---:|---:|---:|---:|---:|")
    print(line(rows[0], len(texts)), flush=True)
    baselines: dict[str, Tensor] = {}
    for name, share, apply in variants(settings, data):
        if not any(fnmatchcase(f"{name} {share}", pattern) for pattern in settings.only):
            continue
        changed = copy.deepcopy(model)
        started = time.perf_counter()
        apply(changed)
        seconds = time.perf_counter() - started
        got = scores(changed, data, texts, settings.batch_size)
        each = (want.exp() * (want - got)).sum(dim=1)
        if name == BASELINE:
            baselines[share] = each
        ratio = interval(each, baselines[share], seed=settings.seed) if share in baselines else None
        rows.append(row(name, got, want, labels, share=share, ratio=ratio, prune_s=seconds))
        print(line(rows[-1], len(texts)), flush=True)
    chosen = {name: value for name, value in vars(settings).items() if name not in ("json", "model", "data")}
    return {"settings": chosen, "data": data.describe(), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality of the pruning methods on a trained text classifier.")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.15, 0.3, 0.5, 0.7])
    run(parser, measure, arguments)


if __name__ == "__main__":
    main()
