"""Which combination of fewer layers, pruning and few bits is best: bytes, accuracy and time, and beside its own parts.

    python benchmarks/bench_combinations.py --model FOLDER --data FILE.parquet --keep RESULTS --epochs 0.5

Model and data as for `bench_quantization_methods.py`. Every combination is made as `compress_to` makes its candidates:
layers taken out, pruned, trained under the model as it was for `--epochs`, quantized (`--method`, `--group-size`) with
the embeddings in `--embeddings`, saved, and evaluated on the held-out texts. `--keep FOLDER` holds all of that, and a
run that was interrupted goes on there. Then all models answer one text of `--length` tokens in turns, beside torch in
float32 and torch's dynamic int8. Printed: times smaller than float32, for the linear layers of the encoder and for the
whole file; accuracy and the share of the original's; KL divergence from the original's answers and share of them that
flips; times faster than both. Under the table, each combination that is
larger or slower than one of its own parts is named, and the smallest of those that reach every goal: `--goals` are the
least values of these five columns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from answers import Kept, each_text
from quality import measured_options, one_text, scores, stored_bytes, subjects
from quantization_peers import torch_dynamic
from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.evaluation.latency import interleaved_latency
from pykd.io.files import atomic_write
from pykd.models.layers import layer_stacks
from pykd.pipeline.candidates import Candidate
from pykd.pipeline.search import Search

FLOAT32, DYNAMIC = "torch float32", "torch dynamic int8"
GOALS = ("encoder", "file", "kept", "x float32", "x int8")

#: What is combined; the parts of a combination are here too.
COMBINATIONS: tuple[Candidate, ...] = (
    *(Candidate(scheme=scheme) for scheme in ("w8a8", "w4a8", "w4a16", "nf4")),
    *(Candidate(pruning=pruning) for pruning in (("neurons", 0.3), ("sparsegpt", 0.5), ("sparsegpt", 0.7))),
    *(Candidate(depth=depth) for depth in (5, 4, 3, 2)),
    *(Candidate(depth=depth, scheme=scheme) for depth in (5, 4, 3, 2) for scheme in ("w8a8", "w4a8")),
    *(Candidate(None, ("neurons", 0.3), scheme) for scheme in ("w8a8", "w4a8")),
    *(Candidate(None, ("sparsegpt", sparsity), scheme) for sparsity in (0.5, 0.7) for scheme in ("w8a8", "w4a16")),
    *(Candidate(depth, ("neurons", 0.3), scheme) for depth in (4, 3, 2) for scheme in (None, "w8a8", "w4a8")),
)


def parts(candidate: Candidate) -> list[Candidate]:
    """The same with less of it."""
    fields = [name for name in ("depth", "pruning", "scheme") if getattr(candidate, name) is not None]
    kept = [names for size in range(1, len(fields)) for names in itertools.combinations(fields, size)]
    return [Candidate(**{name: getattr(candidate, name) for name in names}) for names in kept]


def encoder_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers of a transformer's blocks as they are stored; norms are left out."""
    blocks = [block for stack in layer_stacks(model).values() for block in stack]
    layers = [module for block in blocks for module in block.modules() if hasattr(module, "in_features")]
    return sum(stored_bytes(layer) for layer in dict.fromkeys(layers))


def answers(name: str, model: nn.Module, data: DataBundle, told: Kept) -> Tensor:
    """Log-probabilities of the classes for the held-out texts, kept in the folder."""
    if told.get(name) is None:
        told.put(name, scores(model, data, range(len(data.test)), batch_size=64), {})
    found = told.get(name)
    assert found is not None
    return found[0]


def rows(search: Search, data: DataBundle, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination that the patterns of `--only` admit: made or taken from the folder, then timed together."""
    original = search.model
    chosen = [each for each in COMBINATIONS if any(fnmatchcase(each.name, pattern) for pattern in settings.only)]
    base, reports = search.measure(Candidate(), rounds=5), {}
    for candidate in chosen:
        reports[candidate.name] = search.measure(candidate, rounds=5)
        print(f"made: {candidate.name}, accuracy {reports[candidate.name].accuracy:.2%}", flush=True)
    models = {FLOAT32: original, DYNAMIC: copy.deepcopy(original)}
    torch_dynamic(models[DYNAMIC], data)
    models |= {candidate.name: search.load(candidate).eval() for candidate in chosen}
    times, whole = interleaved_latency(models, one_text(settings.length), settings.rounds), encoder_bytes(original)
    told = Kept(settings.keep / "answers", {"data": data.fingerprint, "length": settings.max_length})
    want, found = answers(FLOAT32, original, data, told), []
    for candidate in chosen:
        name, report = candidate.name, reports[candidate.name]
        each = each_text(answers(name, models[name], data, told), want)
        found.append(
            {
                "name": name,
                "encoder": whole / encoder_bytes(models[name]),
                "file": base.size_bytes / report.size_bytes,
                "accuracy": report.accuracy,
                "kept": report.accuracy / base.accuracy,
                "kl": float(each["kl"].mean()),
                "flips": float(each["flips"].mean()),
                "x float32": times[FLOAT32] / times[name],
                "x int8": times[DYNAMIC] / times[name],
                "ms": times[name],
            }
        )
    return found


def line(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    cells = (f"{row['encoder']:.2f}", f"{row['file']:.2f}", f"{row['accuracy']:.2%}", f"{row['kept']:.2%}",
             f"{row['kl']:.6f}", f"{row['flips']:.2%}")  # fmt: skip
    return f"| {row['name']} | {' | '.join(cells)} | {row['x float32']:.2f} | {row['x int8']:.2f} | {row['ms']:.2f} |"


def beside_parts(found: Sequence[Mapping[str, Any]], slack: float) -> list[str]:
    """Combinations that a part of them beats in size or speed; slack: the share that a time may be wrong by."""
    known, said = {row["name"]: row for row in found}, []
    for candidate in COMBINATIONS:
        for part in parts(candidate):
            if candidate.name in known and part.name in known:
                whole, alone = known[candidate.name], known[part.name]
                if whole["file"] < alone["file"]:
                    said.append(f"larger than its part: {candidate.name} is {whole['file']:.2f}x smaller than float32, "
                                f"{part.name} alone {alone['file']:.2f}x")  # fmt: skip
                if whole["ms"] > alone["ms"] * (1 + slack):
                    said.append(f"slower than its part: {candidate.name} takes {whole['ms'] / alone['ms']:.2f}x the "
                                f"time of {part.name}")  # fmt: skip
    return said


def verdict(found: Sequence[Mapping[str, Any]], goals: Sequence[float]) -> str:
    """The smallest combination within all goals, or how close the nearest comes."""
    short = {row["name"]: max(goal / row[name] for name, goal in zip(GOALS, goals, strict=True)) for row in found}
    within = [row for row in found if short[row["name"]] <= 1]
    if within:
        return f"within every goal: {max(within, key=lambda row: row['file'])['name']}, the smallest of {len(within)}"
    best = min(short, key=lambda name: short[name])
    row = next(row for row in found if row["name"] == best)
    missed = [
        f"{name} {row[name]:.3g} of {goal:g}" for name, goal in zip(GOALS, goals, strict=True) if row[name] < goal
    ]
    return f"none is within every goal; {best} comes closest and misses {', '.join(missed)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Combinations of distillation, pruning and quantization, measured.")
    measured_options(parser)
    parser.add_argument("--keep", type=pathlib.Path, required=True, metavar="FOLDER", help="all models and results")
    parser.add_argument("--epochs", type=float, default=0.5, help="of training under the model as it was")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--method", default="gptq", help="how 4-bit codes are chosen")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--embeddings", default="w4a16")
    parser.add_argument("--length", type=int, default=64, help="tokens of the timed text")
    parser.add_argument("--rounds", type=int, default=20, help="in which all models answer in turns")
    parser.add_argument("--slack", type=float, default=0.05, help="share by which a time may be wrong")
    parser.add_argument("--goals", type=float, nargs=len(GOALS), default=[8, 6.5, 0.97, 3.5, 1.2], metavar="LEAST")
    settings = parser.parse_args(arguments)
    model, data, texts, _ = subjects(settings)
    held_out = [data.test[index] for index in texts]
    data = dataclasses.replace(data, test=held_out, fingerprint=f"{data.fingerprint}-{len(texts)}-{settings.seed}")
    quantization = {"embeddings": settings.embeddings, "method": settings.method, "group_size": settings.group_size}
    training = {"epochs": settings.epochs, "lr": settings.lr, "progress": None}
    search = Search(model, model, data, settings.keep, quantization, training, settings.seed)
    search.bind()
    found = rows(search, data, settings)
    print("\n| combination | encoder smaller | file smaller | accuracy | kept | KL | flips | x float32 | x int8 | ms |")
    print("\n".join(["|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", *map(line, found), ""]))
    print("\n".join([*beside_parts(found, settings.slack), verdict(found, settings.goals)]))
    atomic_write(settings.keep / "combinations.json", json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
