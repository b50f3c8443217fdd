"""`quantize`: store weights in 4, 8 or 16 bits and multiply them as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from pykd.calibration import Batch, Data, calibrate, calibration_batches
from pykd.calibration.inputs import Inputs
from pykd.errors import DataError
from pykd.nn.linear_4bit import is_4bit
from pykd.nn.linear_8bit import STATIC
from pykd.nn.selection import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    layers_of,
    replace_layer,
    select_layers,
    transposed,
    uncovered,
)
from pykd.nn.sparse_linear import SparseWeight
from pykd.quantization.embeddings import check_embeddings, quantize_embeddings
from pykd.quantization.methods import Choose, check_group_size, check_method
from pykd.quantization.observers import Observer, check_observer
from pykd.quantization.packing import (
    Options,
    Pack,
    Packer,
    Schemes,
    as_dense,
    packers,
    schemes_of,
    stored_bytes,
    uses_static,
)
from pykd.quantization.sensitivity import Assignment
from pykd.quantization.zeros import sentences, worth
from pykd.training.record import recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)

#: A packed layer must save this much: describing it costs some hundred bytes of the saved files.
LEAST_SAVING_BYTES = 1024

UNREACHED = "calibration never reached it: give data that uses it, or quantize it with method='rtn'"


def quantize(
    model: Model,
    scheme: Schemes = "w4a16",
    *,
    method: str | Choose = "rtn",
    group_size: int | None = 64,
    symmetric: bool = True,
    observer: str | Observer = "minmax",
    data: Data | None = None,
    samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    embeddings: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Model:
    """Quantize the Linear and Conv2d layers of ``model`` in place, and its embeddings on request; returns it.

    Args:
        scheme: "w4a16", "nf4", "fp4" (weights in 4 bits), "w4a8" (and activations in 8 bits, rounded at each call under
            a scale per row and group), "w8a8" (weights in 8 bits, and activations under a scale per row),
            "w8a8_static" (activations under one scale and zero point, chosen on ``data`` before), "w8a16" (weights in 8
            bits), "bf16", "fp16" (weights in 16 bits); 4 bits by a table of your own, named by
            `pykd.nn.codebook_code(16 numbers)`; {pattern of layer names: scheme}, of which the first that fits counts,
            such as `assign_bits` finds; or a function of (dense layer, group size) that returns the packed layer.
        method: how 4-bit codes are chosen. Without data: "rtn", round to nearest; "hqq" (Badri and Shaji 2023), scales
            that outliers do not spoil. By the error of the layer's outputs on ``data``: "gptq" (Frantar et al. 2022),
            codes that make up for each other's errors; "awq" (after Lin et al. 2023), scales only. Or a function like
            these, (weight, inputs, *, code, group_size) -> FourBit, which gets statistics of the inputs when there is
            ``data`` and None when not. Only "rtn" goes with 8 and 16 bits.
        group_size: inputs that share a scale in the 4-bit schemes; None: all of an output.
        symmetric: False stores an integer zero point per group; schemes "w4a16" and "w4a8" only.
        observer: which range of activations "w8a8_static" rounds: "minmax", all that calibration saw; or less, and what
            lies beyond is cut off: "percentile" (99.99 % of them), "mse" (the least mean squared error); or a function
            like these, Sample -> (low, high). Cutting off costs transformers dearly, whose few large activations count.
            Refused for other schemes.
        data: examples for the methods and the scheme that look at inputs, not read by the others: a DataBundle (its
            training split), or an iterable of batches, as dicts of tensors by input name or as tensors, labels unused.
        samples: how many examples; batch_size: how many at once, from a DataBundle; seed: which, from a DataBundle.
        embeddings: scheme of the embeddings, "w4a16", "nf4", "fp4", "w8a16", "bf16" or "fp16", by plain rounding; None
            leaves them as they are. "w8a16" goes with any ``scheme``: it costs next to nothing, and embeddings can be
            half a model.
        include, exclude: shell patterns of layer names, embeddings too; by default all but norms and output heads.

    A weight that an embedding shares with an output projection or with other embeddings is quantized once and stays
    shared: these layers then compute with the embedding's tensors (`pykd.nn.TiedLinear`), under one of the patterns or
    not; excluding one of them leaves all as they are.

    Layers are quantized in the order in which the model runs them, each by the inputs that it gets behind the packed
    ones; the statistics of one input are in memory at a time: 4 * in_features^2 bytes, and a few times that while codes
    are chosen. A layer that calibration never reached, or that would save less than LEAST_SAVING_BYTES, stays as it is
    and is named with the reason in ``model.pykd_report``; so is, unless ``include`` chooses, whatever else holds
    weights. Weights that are exactly zero stay so under every method, and sparse layers are stored sparse where that is
    smaller; the report's ``notes`` say in words where zeros save no bytes or no time any more. Packed weights are
    constants: train before.

    Raises ValueError for an unknown scheme or method or ones that do not go together, a method without the data that it
    needs, numbers out of range, patterns that match nothing, NaN or infinite weights or activations, and data that
    reaches no layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> type(quantize(model, "w4a16", method="gptq", data=[torch.randn(32, 64)])[0]).__name__
    'Linear4bit'
    """
    check_method(scheme, method, symmetric=symmetric)
    check_observer(observer)
    if observer != "minmax" and not uses_static(scheme) and not isinstance(scheme, Assignment):
        raise ValueError(f"observer chooses the ranges of scheme {STATIC!r}, got scheme {_name(scheme)!r}")
    check_embeddings(embeddings)
    check_group_size(group_size)
    options = Options(method, group_size, symmetric, observer, data is not None)
    batches = None
    wanting = _wants_data(scheme, options)
    if wanting is not None:
        if data is None:
            raise DataError(
                f"{wanting} looks at the inputs of each layer: pass data=, some hundred examples of what the model is "
                "for; without any, use method='hqq' and scheme 'w4a16' or 'w8a8'"
            )
        batches = calibration_batches(data, samples=samples, batch_size=batch_size, seed=seed)
    require_finite_weights(model, "model")
    kinds = (*LINEAR, *transposed(), *CONVOLUTION, *(EMBEDDING if embeddings is not None else ()))
    named = include
    if include is None and isinstance(scheme, Mapping):
        named = [*scheme, *(layers_of(model, EMBEDDING) if embeddings is not None else ())]
    selection = select_layers(model, kinds, include=named, exclude=exclude)
    parameters = {
        "scheme": dict(scheme) if isinstance(scheme, Mapping) else _name(scheme),
        "group_size": group_size,
        "symmetric": symmetric,
        "observer": _name(observer) if uses_static(scheme) else None,
        "samples": None if batches is None else sum(len(next(iter(batch.values()))) for batch in batches),
        "embeddings": embeddings,
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }
    tables = [name for name, layer in selection.chosen.items() if isinstance(layer, EMBEDDING)]
    names, skipped = [name for name in selection.chosen if name not in tables], selection.skipped
    if named is None:
        skipped |= _beyond(model, kinds)
    del selection  # holds the dense layers
    with recorded_change(model, stage="quantize", method=_name(method), parameters=parameters) as facts:
        changed: dict[str, dict[str, Any]] = {}
        left: dict[str, str] = {}
        if embeddings is not None and tables:  # first: the layers behind them are calibrated by the packed ones
            changed, left = quantize_embeddings(
                model,
                tables,
                embeddings,
                group_size=group_size,
                symmetric=symmetric or embeddings != "w4a16",
                least_saving_bytes=LEAST_SAVING_BYTES,
            )
        if names:
            packing = packers(scheme, names, options)
            left |= {name: "no pattern of `scheme` fits it" for name in names if name not in packing}
            packed, unpacked = _quantize_layers(model, packing, batches)
            changed, left = {**changed, **packed}, {**left, **unpacked}
        skipped = {name: reason for name, reason in {**skipped, **left}.items() if name not in changed}
        facts.update(changed=changed, skipped=skipped, notes=sentences(model, changed, skipped))
        if isinstance(scheme, Assignment):
            facts["assignment"] = scheme.record()
    return model


def _beyond(model: nn.Module, kinds: Sequence[type[nn.Module]]) -> dict[str, str]:
    """What holds weights beside the layers of these classes, and why it is left."""
    embeddings = layers_of(model, EMBEDDING)
    return {
        name: "embeddings=None leaves embeddings as they are" if name in embeddings else reason
        for name, reason in uncovered(model, kinds, LEAST_SAVING_BYTES).items()
    }


def _name(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)


def _wants_data(scheme: Schemes, options: Options) -> str | None:
    """Which choice needs calibration, if one does."""
    if options.chosen().calibrated and any(is_4bit(each) for each in schemes_of(scheme)):
        return f"method {_name(options.method)!r}"
    return f"scheme {STATIC!r}" if uses_static(scheme) else None


def _quantize_layers(
    model: nn.Module, packing: dict[str, Packer], batches: Sequence[Batch] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What became of each layer, and why others were left."""
    changed: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}

    def visit(name: str, inputs: Inputs | None = None) -> None:
        outcome = _quantize_layer(model, name, packing[name].pack, inputs)
        if isinstance(outcome, str):
            skipped[name] = outcome
        else:
            changed[name] = outcome

    if batches is None:
        for name in packing:
            visit(name)
        return changed, skipped
    collected = {kind: any(getattr(each, kind) for each in packing.values()) for kind in ("hessian", "sample")}
    skipped.update(dict.fromkeys(calibrate(model, list(packing), batches, visit, **collected), UNREACHED))
    if all(reason == UNREACHED for reason in skipped.values()) and not changed:
        raise ValueError(
            f"calibration reached none of {len(packing)} layers: give data=, inputs that the model runs on"
        )
    return changed, skipped


@torch.no_grad()
def _quantize_layer(model: nn.Module, name: str, pack: Pack, inputs: Inputs | None) -> dict[str, Any] | str:
    """Replace one layer; what it saves, or why it was left."""
    layer = model.get_submodule(name)
    before = stored_bytes(layer)
    packed = pack(as_dense(layer), inputs)
    after = stored_bytes(packed)
    if before - after < LEAST_SAVING_BYTES:
        return f"would be stored in {after} instead of {before} bytes: no gain"
    replace_layer(model, layer, packed)
    zeros = {"zeros": worth(packed)} if isinstance(layer, SparseWeight) else {}
    return {"type": type(packed).__name__, "bytes_before": before, "bytes_after": after, **zeros}
