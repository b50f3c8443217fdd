"""The verb `export`: a model in the format of someone else, checked as it was written, and timed beside pykd."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.data.bundle import batches
from pykd.errors import ArtifactError, nearest
from pykd.evaluation.counting import saved_bytes
from pykd.evaluation.latency import interleaved_latency
from pykd.io.card import CARD, model_card
from pykd.io.export.onnx_model import OnnxModel
from pykd.io.files import atomic_directory, check_vacant
from pykd.io.manifest import owned, write_manifest
from pykd.io.save import save_pretrained
from pykd.models.adapter import inputs_of, origin, unwrap
from pykd.models.example import example_batch

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """module: of pykd.io.export, with the function `write`. packages: what it needs, for `pip install 'pykd[export]'`.
    library: its name on hubs; usage: the lines of Python that load it; file: what of it counts as its size."""

    module: str
    packages: tuple[str, ...]
    library: str
    usage: tuple[str, ...]
    file: str


#: Formats beside "dense". One line per format, one file in pykd/io/export.
FORMATS: dict[str, Format] = {
    "onnx": Format(
        "onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
        ("import onnxruntime", 'session = onnxruntime.InferenceSession("FOLDER/model.onnx")'),
        "model.onnx",
    ),
    "compressed-tensors": Format(
        "compressed_tensors",
        ("compressed_tensors",),
        "transformers",
        ("from vllm import LLM", 'model = LLM("FOLDER")'),
        "*.safetensors",
    ),
    "gguf": Format(
        "gguf",
        ("gguf",),
        "gguf",
        ("from gguf import GGUFReader", 'file = GGUFReader("FOLDER/model.gguf")'),
        "model.gguf",
    ),
}
#: Held-out examples that an export is checked on, and how many at a time.
CHECKED, ROWS = 64, 16
#: Sizes (rows, length) of inputs that are drawn where there is no data: other sizes than those of the trace, too.
DRAWN = ((2, 8), (1, 5), (5, 13))


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    data: DataBundle | Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    latency_rounds: int = 20,
) -> dict[str, Any]:
    """Write the model in another format into a folder, compare what was written with the model, and return a record.

    Args:
        model: dense or compressed, of transformers or torchvision; it is not changed.
        path: a new folder (`overwrite` as in `pykd.save_pretrained`), written whole or not at all.
        format: "dense" (what `pykd.save_pretrained(format="dense")` writes) or a key of `FORMATS`. "onnx": one file
            `model.onnx` for ONNX Runtime, int4 as MatMulNBits, w8a8_static between QuantizeLinear and DequantizeLinear,
            w8a8 (a scale per row, which those do not have) as MatMulInteger, everything else dequantized by nodes of
            the graph when it is loaded; batch and sequence of any size, encoder-decoders and language models without
            cache. "compressed-tensors": a folder for vLLM and transformers, of linear layers in w4a16, w8a16, w8a8 or
            w8a8_static. "gguf": a file of a Llama for llama.cpp, int4 as Q4_0, uint4 as Q4_1, int8 as Q8_0; without
            vocabulary.
        data: what "onnx" is checked on, a DataBundle (64 examples of its test split) or batches; None draws inputs.
        tokenizer, processor, provenance: written beside, as by `pykd.save_pretrained`.
        latency_rounds: alternating rounds in which ONNX Runtime and pykd are timed at batch 1; 0 for none.

    Returns the record that is also in the manifest's stages: `format`, `size_bytes`, `notes`, and for "onnx" `check`
    (logits compared with those of pykd) and `latency_ms` with `faster_than_pykd`. Raises ArtifactError for an unknown
    format, a package that is missing, what a format cannot hold, and a file that does not compute what the model does.

    >>> import tempfile
    >>> from pykd.models.torchvision import load_torchvision
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(load_torchvision("squeezenet1_1", num_classes=3), f"{folder}/model", format="dense")["format"]
    'dense'
    """
    model, path = unwrap(model), Path(path)
    given: dict[str, Any] = {"tokenizer": tokenizer, "processor": processor, "provenance": provenance}
    if format == "dense":
        save_pretrained(model, path, **given, overwrite=overwrite, format="dense")
        return {"stage": "export", "format": format, "size_bytes": saved_bytes(path), "notes": []}
    if format not in FORMATS:
        raise ArtifactError(nearest("format", format, ["dense", *FORMATS]))
    told = FORMATS[format]
    require(format)
    check_vacant(path, overwrite=overwrite, owned=owned)
    with atomic_directory(path, overwrite=overwrite, owned=owned) as folder:
        for companion in (tokenizer, processor):
            if companion is not None:
                companion.save_pretrained(folder)
        inputs = checked_inputs(model, data)
        written = importlib.import_module(f"pykd.io.export.{told.module}").write(model, folder, inputs)
        size = sum(file.stat().st_size for file in folder.glob(told.file))
        record = {"stage": "export", "format": format, "size_bytes": size, **written}
        if format == "onnx" and latency_rounds:
            record |= _timed(model, folder / told.file, inputs[0], latency_rounds)
        about: dict[str, Any] = {
            "provenance": provenance or {},
            "stages": [*getattr(model, "pykd_report", []), record],
        }
        card = model_card(model, **about, name=path.absolute().name, library=told.library, usage=told.usage)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_manifest(folder, **about)
    return record


def require(format: str) -> None:
    """Raise ArtifactError if a package that the format needs is not installed."""
    for package in FORMATS[format].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ArtifactError(
                f"the format {format!r} needs the package {package} ({error}): pip install 'pykd[export]'."
            ) from error


def checked_inputs(model: nn.Module, data: DataBundle | Sequence[Mapping[str, Tensor]] | None) -> list[Batch]:
    """Batches of what the model's forward takes; the first is also the one that a graph is traced with."""
    if data is None:
        text = getattr(model, "main_input_name", "") == "input_ids"
        shapes = DRAWN if text else DRAWN[:1]
        return [example_batch(model, rows=rows, length=length, seed=n) for n, (rows, length) in enumerate(shapes)]
    found: Any = data
    if isinstance(data, DataBundle):
        rows = [data.test[index] for index in range(min(CHECKED, len(data.test)))]
        found = batches(rows, data.collate, ROWS)
    torchvision = origin(model)["source"] == "torchvision"
    return [{"pixel_values": batch["pixel_values"]} if torchvision else inputs_of(model, batch) for batch in found]


def _timed(model: nn.Module, file: Path, batch: Batch, rounds: int) -> dict[str, Any]:
    """One call of a single row by both, in alternating rounds, with as many threads."""
    one = {name: value[:1] for name, value in batch.items()}
    timed = interleaved_latency({"pykd": model, "onnxruntime": OnnxModel(file)}, one, rounds)
    latency = {name: round(timed[name], 4) for name in ("pykd", "onnxruntime")}
    return {"latency_ms": latency, "faster_than_pykd": round(timed.speedup("onnxruntime"), 3)}
