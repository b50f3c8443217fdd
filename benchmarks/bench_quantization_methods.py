"""What 4 and 8 bits cost a trained text classifier, by method and beside peers, on texts it was not trained on.

    python benchmarks/bench_quantization_methods.py --model FOLDER --data FILE.parquet --texts 10000 \
        --group-size 32 128 --keep RESULTS

model: a folder that pykd or Hugging Face saved, with its tokenizer. data: a table that `pykd.data.load_text` reads;
with a column `split` (as `benchmarks/data/debian.py` writes it) its `test` rows are measured and its `train` rows
calibrate. The columns are those of `quality.py`. KL and flips of one rounding are one draw: of two variants whose
output errors are apart by a few percent, either may have the lower KL, and no interval over texts tells.

"plain rounding" is round to nearest between a group's smallest and largest weight, with zero points; "symmetric" under
the largest magnitude. "textbook gptq" is the algorithm as printed. "embeddings" quantizes the embeddings alone, "+
embeddings" them too. The peers (bitsandbytes, HQQ, torchao, torch) round the same linear layers; their 4-bit weights
are unpacked and run dense, so what is compared is the choice of the codes and not a kernel, and torchao's codes, which
it keeps a byte each, count as 4 bits; only int8, which rounds activations too, runs as it is. ONNX Runtime runs the
exported model after its own quantizers. HQQ stores 32 bits a
group where ours stores 16, or 20 with zero points: with groups twice as long it is at equal bits. A peer that is not
installed or fails is listed as not measured.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from answers import Variant
from onnx_peer import GROUPED, dynamic_int8, int4, onnx_peer
from quality import run, stored_bytes
from quantization_peers import INT8, OWN_PRODUCTS, PEERS, apply_peer, plain, textbook_gptq
from torch import nn

from pykd.data import DataBundle
from pykd.nn.selection import select_layers
from pykd.quantization import METHODS, quantize

#: 8 and 16 bits, and what they are held against.
WITHOUT_GROUPS = {"bf16": (), "w8a8": tuple(INT8), "w8a8_static": tuple(INT8), "w8a16": ()}
#: 4-bit scheme, whether symmetric, and the methods that go with it.
SCHEMES: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    *((scheme, symmetric, tuple(METHODS)) for scheme, symmetric in (("w4a16", True), ("w4a16", False), ("nf4", True))),
    ("fp4", True, tuple(METHODS)),
    ("w4a8", True, ("rtn", "gptq")),
    ("w4a8", False, ("rtn", "gptq")),
)
#: Schemes of the embeddings: alone, and together with linear layers in w4a16.
EMBEDDINGS: tuple[str, ...] = ("w8a16", "w4a16", "nf4")


def variants(settings: argparse.Namespace) -> list[Variant]:
    """What is held against others comes first."""
    found = [Variant(name, apply, peer=True, timed=name not in OWN_PRODUCTS) for name, apply in INT8.items()]
    found.append(Variant("ONNX Runtime dynamic int8", onnx_peer(dynamic_int8), peer=True, same_layers=False))
    for scheme, beside in WITHOUT_GROUPS.items():
        found.append(Variant(f"pykd {scheme}", ours(settings, scheme=scheme), beside))
    for size in settings.group_size:
        found += of_groups(settings, size)
    return found


def of_groups(settings: argparse.Namespace, size: int) -> Iterator[Variant]:
    """The 4-bit variants in groups of one size."""
    end, rounding = f" g={size}", f"plain rounding g={size}"
    make = functools.partial(ours, settings, scheme="w4a16", group_size=size)
    yield Variant(rounding, make(method=plain, symmetric=False))
    yield Variant(f"plain rounding symmetric{end}", make(method=plain), (rounding,))
    yield Variant(f"textbook gptq{end}", make(method=textbook_gptq, calibrates=True), (rounding,))
    options = {"method": textbook_gptq, "symmetric": False, "calibrates": True}
    yield Variant(f"textbook gptq asymmetric{end}", make(**options), (rounding,))
    for scheme, symmetric, methods in SCHEMES:
        for method in methods:
            kind = "" if symmetric else " asymmetric"
            beside = [rounding, f"textbook gptq{kind}{end}"]
            beside += [f"pykd w4a16{kind} {method}{end}"] if scheme == "w4a8" else []
            apply = make(scheme=scheme, symmetric=symmetric, method=method)
            yield Variant(f"pykd {scheme}{kind} {method}{end}", apply, tuple(beside))
    for scheme in EMBEDDINGS:
        alone = make(embeddings=scheme, include=["*embeddings*"])
        yield Variant(f"pykd embeddings {scheme}{end}", alone)
        for method in ("rtn", "gptq"):
            together = make(embeddings=scheme, method=method)
            yield Variant(f"pykd w4a16 {method} + embeddings {scheme}{end}", together, (f"pykd w4a16 {method}{end}",))
    for name in PEERS:

        def peer(model: nn.Module, data: DataBundle, name: str = name) -> int:
            return apply_peer(model, PEERS[name](), size)

        yield Variant(f"{name}{end}", peer, (rounding,), peer=True, timed=False)
    for name, level in GROUPED.items():
        apply = onnx_peer(functools.partial(int4, group_size=size, accuracy_level=level))
        yield Variant(f"{name}{end}", apply, (rounding,), peer=True, same_layers=False)


def ours(settings: argparse.Namespace, *, calibrates: bool = False, **options: Any) -> Any:
    """`quantize` with these options, as a variant applies it. calibrates: a method of one's own gets the data too."""

    def apply(model: nn.Module, data: DataBundle) -> int:
        given = data if calibrates or isinstance(options.get("method", "rtn"), str) else None
        drawn = {"samples": settings.samples, "batch_size": settings.batch_size, "seed": settings.seed}
        quantize(model, data=given, **drawn, **options)
        return stored_bytes(model)

    return apply


def layers(model: nn.Module) -> list[str]:
    """The linear layers that `quantize` takes."""
    return list(select_layers(model, (nn.Linear,)).chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality of the quantization methods on a trained text classifier.")
    parser.add_argument("--group-size", type=int, nargs="+", default=[64], help="weights that share a scale")
    run(parser, variants, layers, arguments)


if __name__ == "__main__":
    main()
