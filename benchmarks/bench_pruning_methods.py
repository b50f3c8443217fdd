"""What removing weights costs a trained text classifier, by method, on texts it was not trained on.

    python benchmarks/bench_pruning_methods.py --model FOLDER --data FILE.parquet --texts 10000 --keep RESULTS

Model, data and texts as for `bench_quantization_methods.py`, the columns are those of `quality.py`; both may keep their
results in one folder. No training: every method sees at most the calibration texts, without labels. The peers, Wanda
(Sun et al. 2023) and SparseGPT (Frantar and Alistarh 2023), are the papers' algorithms written here once more, layer
after layer behind the pruned ones, by the same texts. Heads, neurons and layers go whole: the share is one of units.
`--recover 0.5` adds what half an epoch of training under the model as it was wins back, for every `--recovered` method
and sparsity ("movement" prunes while it trains); with `--keep` it can be interrupted.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from answers import Variant
from quality import run, stored_bytes
from torch import Tensor, nn

from pykd.calibration import Inputs, calibrate, calibration_batches
from pykd.data import DataBundle
from pykd.distillation import distill
from pykd.pruning import Gradual, prune
from pykd.pruning.weights import select_weights
from pykd.training.checkpoint import has_checkpoint

#: Methods of `prune`, and the patterns that some of them are measured with.
METHODS = ("random", "magnitude", "wanda", "sparsegpt")
UNITS = ("heads", "neurons", "layers")
PATTERNS = ("2:4", "1:4")

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


PEERS: dict[str, Peer] = {"textbook sparsegpt": textbook_sparsegpt, "textbook wanda": textbook_wanda}


def variants(settings: argparse.Namespace) -> list[Variant]:
    """What is held against others comes first."""
    found = []
    for sparsity in settings.sparsity:
        end = f" {100 * sparsity:g} %"
        beside = (f"textbook sparsegpt{end}",)
        found += [
            Variant(f"{name}{end}", theirs(settings, peer, sparsity), beside if "wanda" in name else ())
            for name, peer in PEERS.items()
        ]
        for method in METHODS:
            others = (*beside, f"textbook wanda{end}") if method == "wanda" else beside
            found.append(Variant(f"pykd {method}{end}", ours(settings, method, sparsity=sparsity), others))
        for method in UNITS:
            apply = ours(settings, method, sparsity=sparsity)
            found.append(Variant(f"pykd {method}{end}", apply, same_layers=False))
        if settings.recover:
            found += [recovered(settings, method, sparsity) for method in settings.recovered]
    for pattern in PATTERNS:
        end, names = f" {pattern}", METHODS[1:]
        found += [Variant(f"pykd {name}{end}", ours(settings, name, pattern=pattern)) for name in names]
    return found


def ours(settings: argparse.Namespace, method: str, **options: Any) -> Callable[[nn.Module, DataBundle], int]:
    """`prune`, as a variant applies it."""

    def apply(model: nn.Module, data: DataBundle) -> int:
        drawn = {"samples": settings.samples, "batch_size": settings.batch_size, "seed": settings.seed}
        return stored_bytes(prune(model, method, data=data, **drawn, **options))

    return apply


def recovered(settings: argparse.Namespace, method: str, sparsity: float) -> Variant:
    """`prune`, then `distill` with the model as it was for a teacher."""
    pruned = f"pykd {method} {100 * sparsity:g} %"
    name = f"{pruned}, {settings.recover:g} epochs at {settings.lr:g}"

    def apply(model: nn.Module, data: DataBundle) -> int:
        teacher: nn.Module = copy.deepcopy(model)
        options: dict[str, Any] = {"lr": settings.lr, "seed": settings.seed, "label": name}
        if method == "movement":
            options["prune"] = Gradual("movement", sparsity)
        else:
            ours(settings, method, sparsity=sparsity)(model, data)
        if settings.keep is not None:
            folder = settings.keep / re.sub(r"[^a-z0-9.]+", "-", name)
            options |= {"checkpoint_dir": folder, "checkpoint_steps": 200, "resume": has_checkpoint(folder)}
        distill(model, teacher, data, epochs=settings.recover, temperature=settings.temperature,
                alpha=settings.alpha, **options)  # fmt: skip
        return stored_bytes(model.eval())

    return Variant(name, apply, (pruned,), same_layers=method not in UNITS)


def theirs(settings: argparse.Namespace, peer: Peer, sparsity: float) -> Callable[[nn.Module, DataBundle], int]:
    """A peer in the layers that `prune` would take, layer after layer behind the pruned ones; stored dense."""

    def apply(model: nn.Module, data: DataBundle) -> int:
        def visit(name: str, inputs: Inputs) -> None:
            weight: Any = model.get_submodule(name).weight
            weight.copy_(peer(weight.detach(), inputs, sparsity))

        texts = calibration_batches(data, samples=settings.samples, batch_size=settings.batch_size, seed=settings.seed)
        calibrate(model, layers(model), texts, visit)
        return stored_bytes(model)

    return apply


def layers(model: nn.Module) -> list[str]:
    """The layers that `prune` takes."""
    return list(select_weights(model).chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality of the pruning methods on a trained text classifier.")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.15, 0.3, 0.5, 0.7])
    parser.add_argument("--recover", type=float, default=0.0, metavar="EPOCHS", help="train pruned models for so long")
    parser.add_argument("--recovered", nargs="+", default=["sparsegpt"], choices=(*METHODS, *UNITS, "movement"),
                        help="methods to train after")  # fmt: skip
    parser.add_argument("--lr", type=float, default=2e-4, help="of the recovery; --temperature, --alpha: as `distill`")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    run(parser, variants, layers, arguments)


if __name__ == "__main__":
    main()
