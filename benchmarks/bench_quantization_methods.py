"""What 4 and 8 bits cost a trained text classifier, by method and beside peers, on texts it was not trained on.

    python benchmarks/bench_quantization_methods.py --model FOLDER --data FILE.parquet --texts 3000 --samples 256

model: a folder that pykd or Hugging Face saved, with its tokenizer. data: a table that `pykd.data.load_text` reads;
with a column `split` (as `benchmarks/data/debian.py` writes it) its `test` rows are measured and its `train` rows
calibrate. Printed per variant: output error, the squared error that rounding the weights makes in the outputs of a
linear layer over the square of the outputs, on the calibration texts, mean over the layers; mean KL divergence of the
class probabilities from those of the model as it was, in nats; texts whose predicted class is another; accuracy; bytes
of all tensors as they would be stored; seconds to quantize. KL and flips of one rounding are one draw: of two variants
whose output errors are apart by a few percent, either may have the lower KL.

"textbook gptq" is the algorithm as printed. "embeddings" quantizes the embeddings alone, "+ embeddings" them too. The
peers (bitsandbytes, HQQ, torchao) round the same linear layers; their weights are unpacked and run dense, so what is
compared is the choice of the codes and not a kernel, and torchao's codes, which it keeps a byte each, count as 4 bits;
only its "int8 per token", which rounds activations too, runs as it is. HQQ stores 32 bits a group where ours stores 16,
or 20 with zero points: with groups twice as long it is at equal bits. A peer that is not installed or fails is listed
as not measured. `--json FILE` also writes the numbers and the environment.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pykd.calibration import calibrate, calibration_batches
from pykd.data import DataBundle, load_text
from pykd.data.bundle import batches, permutation
from pykd.data.tables import is_local, read_table
from pykd.models.adapter import logits
from pykd.nn.codecs.four_bit import FourBit, from_levels
from pykd.nn.selection import select_layers
from pykd.pipeline.saved import load_saved
from pykd.quantization import METHODS, Inputs, quantize

#: Scheme, whether symmetric, and the methods that go with it.
SCHEMES: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("bf16", True, ("rtn",)),
    ("w8a8", True, ("rtn",)),
    ("w8a8_static", True, ("rtn",)),
    ("w8a16", True, ("rtn",)),
    *((scheme, symmetric, tuple(METHODS)) for scheme, symmetric in (("w4a16", True), ("w4a16", False), ("nf4", True))),
    ("fp4", True, tuple(METHODS)),
    ("w4a8", True, ("rtn", "gptq")),
    ("w4a8", False, ("rtn", "gptq")),
)

#: Schemes of the embeddings: alone, and together with linear layers in w4a16.
EMBEDDINGS: tuple[str, ...] = ("w8a16", "w4a16", "nf4")

#: weight, group size -> (what the peer makes of it, the bytes that it stores)
Peer = Callable[[Tensor, int], tuple[Tensor, int]]
Row = dict[str, Any]
Measure = Callable[[argparse.Namespace], dict[str, Any]]


def bitsandbytes(kind: str) -> Peer:
    """Round to the table under the largest magnitude; scales in float32."""
    from bitsandbytes import functional

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=group_size, quant_type=kind)
        return functional.dequantize_4bit(packed, state), packed.nbytes + state.absmax.nbytes

    return round_weight


def hqq(longer: int = 1) -> Peer:
    """Half-quadratic quantization with zero points in floating point; float16 scales and zero points."""
    from hqq.core.quantize import Quantizer

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        options: dict[str, Any] = {"nbits": 4, "channel_wise": True, "optimize": True, "axis": 1, "device": "cpu"}
        packed, meta = Quantizer.quantize(
            weight, group_size=longer * group_size, compute_dtype=torch.float16, **options
        )
        size_bytes = packed.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        return Quantizer.dequantize(packed, meta).to(weight.dtype), size_bytes

    return round_weight


def torchao() -> Peer:
    """Symmetric int4 under the largest magnitude; scales in the weight's type."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        holder[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(holder, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size)))
        stored: Any = holder[0].weight
        return stored.dequantize(), -(-weight.numel() // 2) + stored.scale.nbytes

    return round_weight


#: A peer that rounds activations too, to int8 with a scale per token, and so runs by itself.
TORCHAO_INT8 = "torchao int8 per token"


def torchao_int8(model: nn.Module) -> int:
    """torchao's dynamic int8 in the linear layers that `quantize` would take."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    chosen = select_layers(model, (nn.Linear,)).chosen
    total = stored_bytes(model) - sum(layer.weight.nbytes for layer in chosen.values())  # type: ignore[union-attr]
    total += sum(layer.weight.numel() + 4 * len(layer.weight) for layer in chosen.values())  # type: ignore[arg-type]
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    return total


@torch.no_grad()
def textbook_gptq(weight: Tensor, inputs: Inputs, *, code: str, group_size: int) -> FourBit:
    """Frantar et al. 2022 as printed: columns in order, 1 % damping, a group's range when its turn comes."""
    work, hessian = weight.detach().double().clone(), inputs.hessian[0].double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    root = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    levels, scales, zeros = torch.empty_like(work), [], []
    for column in range(work.shape[1]):
        if column % group_size == 0:
            group = work[:, column : column + group_size]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scale = ((high - low) / 15 if code == "uint4" else group.abs().amax(1) / 7.5).half().double()
            scale = scale.clamp(min=2**-24)
            zero = (-low / scale).round().clamp(0, 15) if code == "uint4" else torch.full_like(low, 8.0)
            scales.append(scale)
            zeros.append(zero)
        level = (work[:, column] / scale).round().clamp(-zero, 15 - zero)
        levels[:, column] = level
        error = (work[:, column] - level * scale) / root[column, column]
        work[:, column + 1 :] -= error[:, None] * root[column, None, column + 1 :]
    found = torch.stack(zeros, 1).float() if code == "uint4" else None
    return from_levels(levels.float(), torch.stack(scales, 1).float(), found, code=code, group_size=group_size)


PEERS: dict[str, Callable[[], Peer]] = {
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes("fp4"),
    "HQQ int4": hqq,
    "HQQ int4, groups twice as long": lambda: hqq(2),
    "torchao int4": torchao,
}


def variants(settings: argparse.Namespace, data: DataBundle) -> Iterator[tuple[str, Callable[[nn.Module], int]]]:
    """Name, and a function that quantizes a model in place and returns the bytes of all its tensors."""
    for scheme, symmetric, methods in SCHEMES:
        for method in methods:
            name = f"pykd {scheme}{'' if symmetric else ' asymmetric'} {method}"

            def ours(model: nn.Module, scheme: str = scheme, symmetric: bool = symmetric, method: str = method) -> int:
                options: dict[str, Any] = {"group_size": settings.group_size, "samples": settings.samples, "data": data}
                quantize(model, scheme, method=method, symmetric=symmetric, seed=settings.seed, **options)
                return stored_bytes(model)

            yield name, ours
    for symmetric in (True, False):
        name = f"textbook gptq{'' if symmetric else ' asymmetric'}"

        def textbook(model: nn.Module, symmetric: bool = symmetric) -> int:
            options: dict[str, Any] = {"group_size": settings.group_size, "samples": settings.samples, "data": data}
            quantize(model, "w4a16", method=textbook_gptq, symmetric=symmetric, seed=settings.seed, **options)
            return stored_bytes(model)

        yield name, textbook
    for scheme in EMBEDDINGS:
        for method in (None, "rtn", "gptq"):
            name = f"pykd embeddings {scheme}" if method is None else f"pykd w4a16 {method} + embeddings {scheme}"

            def with_embeddings(model: nn.Module, scheme: str = scheme, method: str | None = method) -> int:
                options: dict[str, Any] = {"include": ["*embeddings*"]} if method is None else {"method": method}
                options |= {"group_size": settings.group_size, "samples": settings.samples, "data": data}
                quantize(model, "w4a16", embeddings=scheme, seed=settings.seed, **options)
                return stored_bytes(model)

            yield name, with_embeddings
    yield TORCHAO_INT8, torchao_int8
    for name, load in PEERS.items():
        yield name, lambda model, load=load: apply_peer(model, load(), settings.group_size)  # type: ignore[misc]


@torch.no_grad()
def apply_peer(model: nn.Module, peer: Peer, group_size: int) -> int:
    """Round the linear layers that `quantize` would; the bytes of all tensors with theirs as the peer stores them."""
    total = stored_bytes(model)
    for layer in select_layers(model, (nn.Linear,)).chosen.values():
        weight: Any = layer.weight
        rounded, size_bytes = peer(weight.detach(), group_size)
        total += size_bytes - weight.nbytes
        weight.copy_(rounded)
    return total


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
def layer_inputs(model: nn.Module, data: DataBundle, settings: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and second moments of the inputs of every linear layer that `quantize` takes."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(name: str, inputs: Inputs) -> None:
        weight: Any = model.get_submodule(name).weight
        found[name] = weight.detach().clone(), inputs.hessian[0]

    texts = calibration_batches(data, samples=settings.samples, batch_size=settings.batch_size, seed=settings.seed)
    calibrate(model, list(select_layers(model, (nn.Linear,)).chosen), texts, visit)
    return found


@torch.no_grad()
def output_error(model: nn.Module, layers: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Mean over the layers of ``sum e H e^T / sum w H w^T`` with e = rounded - w."""
    total = 0.0
    for name, (weight, hessian) in layers.items():
        rounded: Any = model.get_submodule(name).weight
        error = rounded.detach().float() - weight
        total += float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
    return total / len(layers)


def row(name: str, got: Tensor, want: Tensor, labels: Tensor, **facts: Any) -> Row:
    """The numbers of one variant."""
    predicted = got.argmax(dim=1)
    return {
        "name": name,
        "kl": float((want.exp() * (want - got)).sum(dim=1).mean()),
        "flips": int((predicted != want.argmax(dim=1)).sum()),
        "accuracy": float((predicted == labels).double().mean()),
        **facts,
    }


def line(found: Row, texts: int) -> str:
    """One line of the table."""
    flips = f"{found['flips']} ({found['flips'] / texts:.2%})"
    error = f"{found['output_error']:.6f}"
    cells = (found["name"], error, f"{found['kl']:.6f}", flips, f"{found['accuracy']:.2%}", f"{found['size_bytes']:,}")
    return f"| {' | '.join(cells)} | {found['quantize_s']:.1f} |"


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
    texts = permutation(len(data.test), seed=settings.seed)[: settings.texts]
    texts.sort(key=lambda index: len(str(data.test[index].get("text", ""))))
    labels = torch.tensor([data.test[index]["labels"] for index in texts])
    return load_saved(settings.model).eval(), data, texts, labels


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Every variant that the patterns of `--only` admit, printed as it is measured."""
    model, data, texts, labels = subjects(settings)
    want = scores(model, data, texts, settings.batch_size)
    if want.shape[1] != len(data.class_names):
        raise SystemExit(f"the model tells {want.shape[1]} classes apart, the data {len(data.class_names)}: not a pair")
    layers = layer_inputs(model, data, settings)
    rows = [row("as it is", want, want, labels, output_error=0.0, size_bytes=stored_bytes(model), quantize_s=0.0)]
    print(f"{len(texts)} texts, {settings.samples} samples, groups of {settings.group_size}\n")
    print("| weights | output error | KL | flips | accuracy | bytes | s |\n|---|---:|---:|---:|---:|---:|---:|")
    print(line(rows[0], len(texts)), flush=True)
    absent: dict[str, str] = {}
    for name, apply in variants(settings, data):
        if not any(fnmatchcase(name, pattern) for pattern in settings.only):
            continue
        changed = copy.deepcopy(model)
        started = time.perf_counter()
        try:
            size_bytes = apply(changed)
        except Exception as error:
            if name not in (*PEERS, TORCHAO_INT8):
                raise
            absent[name] = f"{type(error).__name__}: {error}"
            continue
        seconds = time.perf_counter() - started
        got = scores(changed, data, texts, settings.batch_size)
        facts = {"output_error": output_error(changed, layers), "size_bytes": size_bytes, "quantize_s": seconds}
        rows.append(row(name, got, want, labels, **facts))
        print(line(rows[-1], len(texts)), flush=True)
    for name, reason in absent.items():
        print(f"not measured: {name} ({reason})")
    chosen = {name: value for name, value in vars(settings).items() if name not in ("json", "model", "data")}
    return {"settings": chosen, "data": data.describe(), "rows": rows, "not_measured": absent}


def run(
    parser: argparse.ArgumentParser, measure: Callable[[Any], dict[str, Any]], arguments: Sequence[str] | None
) -> None:
    """Parse the options that all such tables share beside the parser's own, measure, and write the numbers if asked."""
    parser.add_argument("--model", required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--data", required=True, help="labelled texts: .csv, .jsonl, .parquet, or a datasets name")
    parser.add_argument("--texts", type=int, default=3000, help="held-out texts that are measured")
    parser.add_argument("--samples", type=int, default=256, help="training texts that calibrate")
    parser.add_argument("--max-length", type=int, default=64, help="tokens a text is cut at")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="which texts and samples, and the bootstrap's draws")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="variants, as 'pykd *'")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers here")
    settings = parser.parse_args(arguments)
    found = measure(settings)
    if settings.json is not None:
        from pykd.evaluation.environment import environment

        content = {"environment": environment(), **found}
        settings.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality of the quantization methods on a trained text classifier.")
    parser.add_argument("--group-size", type=int, default=64)
    run(parser, measure, arguments)


if __name__ == "__main__":
    main()
