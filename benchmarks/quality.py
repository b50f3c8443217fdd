"""Variants of a trained text classifier on the same held-out texts: what each answers, kept, and compared text by text.

What `bench_quantization_methods.py` and `bench_pruning_methods.py` share. Printed per variant: output error, the
squared error that the changed weights make in the outputs of a linear layer over the square of the outputs, on the
calibration texts, mean over the layers (not where layers got smaller or are out of reach); mean KL divergence of the
class probabilities from those of the model as it was, in nats; flips, texts whose predicted class is another; accuracy,
and the percentage points of it that were lost; bytes of all tensors as they would be stored; P50 of a call with one
text of `--max-length` tokens, in `--rounds` in which the variant and the model as it is take turns, and how many times
faster that is (not for what runs dense here in the place of kernels of its own, nor for what was kept untimed); seconds
to make it. A second table has the ratios of a variant's mean KL and of its flips to those of the variants that it is to
be held against. Intervals are of a bootstrap over the texts, paired, since all variants answer the same ones. With
`--keep FOLDER` what a variant answers stays there: a run that was interrupted, or one of other variants (`--only`,
`--list`), measures none of them twice.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from answers import Kept, Row, Variant, each_text, points_lost, ratios
from torch import Tensor, nn

from pykd.calibration import Inputs, calibrate, calibration_batches
from pykd.data import DataBundle, load_text
from pykd.data.bundle import batches, permutation
from pykd.data.tables import is_local, read_table
from pykd.evaluation.latency import interleaved_latency
from pykd.io.files import sha256
from pykd.models.adapter import logits
from pykd.pipeline.saved import load_saved

#: Weight of a layer and second moments of its inputs.
Layers = dict[str, tuple[Tensor, Tensor]]
ORIGINAL = "as it is"
HEAD = (
    "| variant | output error | KL | flips | accuracy | points lost [95 %] | bytes | P50 ms | faster | s |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
HEAD_RATIOS = "| variant | beside | KL ratio [95 %] | flips ratio [95 %] |\n|---|---|---:|---:|"


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of a state dict."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@torch.inference_mode()
def scores(model: nn.Module, data: DataBundle, texts: Sequence[int], batch_size: int) -> Tensor:
    """Log-probabilities of the classes, float64 [texts, classes]."""
    rows = [data.test[index] for index in texts]
    found = [logits(model, batch) for batch in batches(rows, data.collate, batch_size)]
    return torch.cat(found).double().log_softmax(dim=1)


@torch.no_grad()
def layer_inputs(model: nn.Module, data: DataBundle, names: Sequence[str], settings: argparse.Namespace) -> Layers:
    """Weight and second moments of the inputs of linear layers."""
    found: Layers = {}

    def visit(name: str, inputs: Inputs) -> None:
        found[name] = dense_weight(model.get_submodule(name)).clone(), inputs.hessian[0]

    texts = calibration_batches(data, samples=settings.samples, batch_size=settings.batch_size, seed=settings.seed)
    calibrate(model, names, texts, visit)
    return found


def dense_weight(layer: Any) -> Tensor:
    """The float32 weight that a layer stands for, whoever packed it."""
    weight = layer.weight() if callable(layer.weight) else layer.weight
    packed = weight.is_quantized or type(weight) not in (Tensor, nn.Parameter)
    result: Tensor = (weight.dequantize() if packed else weight).detach().float()
    return result


@torch.no_grad()
def output_error(model: nn.Module, layers: Layers) -> float:
    """Mean over the layers of ``sum e H e^T / sum w H w^T`` with e = new weight - w."""
    total = 0.0
    for name, (weight, hessian) in layers.items():
        error = dense_weight(model.get_submodule(name)) - weight
        total += float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
    return total / len(layers)


def line(found: Row, texts: int) -> str:
    """One line of the table."""
    flips = f"{found['flips']} ({found['flips'] / texts:.2%})"
    error = "-" if found["output_error"] is None else f"{found['output_error']:.6f}"
    lost = "{:.2f} [{:.2f}, {:.2f}]".format(*found["points_lost"])
    cells = (found["name"], error, f"{found['kl']:.6f}", flips, f"{found['accuracy']:.2%}", lost)
    times = f"{found['p50_ms']:.2f} | {found['faster']:.2f}" if "p50_ms" in found else "- | -"
    return f"| {' | '.join(cells)} | {found['size_bytes']:,} | {times} | {found['seconds']:.1f} |"


def ratio_lines(found: Row) -> list[str]:
    """The lines of the second table."""
    said = []
    for name, pair in found["ratios"].items():
        cells = ["-" if each is None else "{:.3f} [{:.3f}, {:.3f}]".format(*each) for each in pair.values()]
        said.append(f"| {' | '.join((found['name'], name, *cells))} |")
    return said


def one_text(tokens: int) -> dict[str, Tensor]:
    """A batch of one text."""
    return {"input_ids": torch.full((1, tokens), 5), "attention_mask": torch.ones(1, tokens, dtype=torch.int64)}


def timed(original: nn.Module, changed: nn.Module, settings: argparse.Namespace) -> Row:
    """P50 of one text by the variant, and how many times faster than the model as it is, which takes turns with it."""
    if not settings.rounds:
        return {}
    models = {ORIGINAL: original, "variant": changed.eval()}
    found = interleaved_latency(models, one_text(settings.max_length), settings.rounds)
    return {"p50_ms": found["variant"], "faster": found.speedup("variant")}


def subjects(settings: argparse.Namespace) -> tuple[nn.Module, DataBundle, list[int], Tensor]:
    """The model, the data, which test texts are measured, and their labels. Short texts come first: less padding."""
    has_split = is_local(settings.data) and "split" in read_table(settings.data).columns
    data = load_text(
        settings.data,
        tokenizer=settings.model,
        text_column=settings.text_column,
        label_column=settings.label_column,
        max_length=settings.max_length,
        split_column="split" if has_split else None,
        test_size=settings.texts,
    )
    if settings.trained_rows is not None:
        data = with_unseen(data, settings.trained_rows, seed=settings.seed)
    texts = permutation(len(data.test), seed=settings.seed)[: settings.texts]
    texts.sort(key=lambda index: len(str(data.test[index].get("text", ""))))
    labels = torch.tensor([data.test[index]["labels"] for index in texts])
    model = load_saved(settings.model).eval()
    known = logits(model, data.example()).shape[1]
    if known != len(data.class_names):
        raise SystemExit(f"the model tells {known} classes apart, the data {len(data.class_names)}: not a pair")
    return model, data, texts, labels


def with_unseen(data: DataBundle, trained_rows: int, *, seed: int) -> DataBundle:
    """Hold out, too, the training rows that a run of `pykd.training.fit` with this seed takes after `trained_rows`."""
    order = permutation(len(data.train), seed=seed)
    seen, unseen = (torch.utils.data.Subset(data.train, rows) for rows in (order[:trained_rows], order[trained_rows:]))
    held_out = torch.utils.data.ConcatDataset([data.test, unseen])
    mark = f"{data.fingerprint} but for {trained_rows} rows"
    return dataclasses.replace(data, train=seen, test=held_out, fingerprint=mark)


def identity(settings: argparse.Namespace, data: DataBundle, texts: int) -> dict[str, Any]:
    """What decides all numbers of a variant."""
    weights = pathlib.Path(settings.model) / "model.safetensors"
    named = ("samples", "max_length", "batch_size", "seed")
    return {
        "model": sha256(weights) if weights.is_file() else settings.model,
        "data": data.fingerprint,
        "texts": texts,
        **{name: getattr(settings, name) for name in named},
    }


def measure(
    settings: argparse.Namespace, variants: Sequence[Variant], layers: Callable[[nn.Module], Sequence[str]]
) -> dict[str, Any]:
    """Every variant that `--only` admits, printed as it is measured. layers(model): whose outputs count."""
    model, data, texts, labels = subjects(settings)
    kept, absent, rows = Kept(settings.keep, identity(settings, data, len(texts))), dict[str, str](), list[Row]()
    inputs = functools.cache(lambda: layer_inputs(model, data, layers(model), settings))
    print(f"{len(texts)} texts, {settings.samples} samples\n\n{HEAD}")
    for variant in (Variant(ORIGINAL, lambda model, data: stored_bytes(model)), *variants):
        if variant.name != ORIGINAL and not any(fnmatchcase(variant.name, pattern) for pattern in settings.only):
            continue
        if kept.get(variant.name) is None:
            changed, started = copy.deepcopy(model), time.perf_counter()
            try:
                size_bytes = variant.apply(changed, data)
                facts = {"size_bytes": size_bytes, "seconds": time.perf_counter() - started}
                facts["output_error"] = None
                if variant.same_layers:
                    facts["output_error"] = 0.0 if variant.name == ORIGINAL else output_error(changed, inputs())
                found = scores(changed, data, texts, settings.batch_size)
                kept.put(variant.name, found, facts | (timed(model, changed, settings) if variant.timed else {}))
            except Exception as error:
                if not variant.peer:
                    raise
                absent[variant.name] = f"{type(error).__name__}: {error}"
                continue
        rows.append(_row(variant, kept, labels, settings.seed))
        print(line(rows[-1], len(texts)), flush=True)
    for name, reason in absent.items():
        print(f"not measured: {name} ({reason})")
    print("\n".join(("", HEAD_RATIOS, *(said for found in rows for said in ratio_lines(found)))), flush=True)
    chosen = {name: value for name, value in vars(settings).items() if name not in ("json", "model", "data", "keep")}
    return {"settings": chosen, "data": data.describe(), "rows": rows, "not_measured": absent}


def _row(variant: Variant, kept: Kept, labels: Tensor, seed: int) -> Row:
    mine, original = kept.get(variant.name), kept.get(ORIGINAL)
    assert mine is not None and original is not None
    each = each_text(mine[0], original[0])
    right, before = (scores.argmax(dim=1) == labels for scores in (mine[0], original[0]))
    return {
        **mine[1],
        "name": variant.name,
        "kl": float(each["kl"].mean()),
        "flips": int(each["flips"].sum()),
        "accuracy": float(right.double().mean()),
        "points_lost": points_lost(before, right, seed=seed),
        "ratios": ratios(variant, kept, original[0], seed),
    }


def measured_options(parser: argparse.ArgumentParser) -> None:
    """The options of every table of a model on held-out texts."""
    parser.add_argument("--model", required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--data", required=True, help="labelled texts: .csv, .jsonl, .parquet, or a datasets name")
    parser.add_argument("--texts", type=int, default=3000, help="held-out texts that are measured")
    parser.add_argument(
        "--trained-rows",
        type=int,
        help="rows (steps x batch) that the model's training took, with --seed, from its first epoch: later ones are "
        "held out as well as the test rows",
    )
    parser.add_argument("--max-length", type=int, default=64, help="tokens a text is cut at")
    parser.add_argument("--seed", type=int, default=0, help="which texts and samples, and the bootstrap's draws")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="variants, as 'pykd *'")


def run(
    parser: argparse.ArgumentParser,
    variants: Callable[[argparse.Namespace], Sequence[Variant]],
    layers: Callable[[nn.Module], Sequence[str]],
    arguments: Sequence[str] | None,
) -> None:
    """Parse the options that all such tables share beside the parser's own, measure, and write the numbers if asked."""
    measured_options(parser)
    parser.add_argument("--samples", type=int, default=256, help="training texts that calibrate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant; 0 for none")
    parser.add_argument("--list", action="store_true", help="print the names of the variants and measure nothing")
    parser.add_argument(
        "--keep", type=pathlib.Path, metavar="FOLDER", help="keep what variants answer, and go on there"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers here")
    settings = parser.parse_args(arguments)
    if settings.list:
        print("\n".join(variant.name for variant in variants(settings)))
        return
    found = measure(settings, variants(settings), layers)
    if settings.json is not None:
        from pykd.evaluation.environment import environment

        content = {"environment": environment(), **found}
        settings.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
