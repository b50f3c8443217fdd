"""`quantize`: store and multiply weights in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pykd.calibration import Batch, Data, calibrate, calibration_batches
from pykd.calibration.inputs import Inputs
from pykd.errors import DataError
from pykd.nn import CompressedModule
from pykd.nn.linear_4bit import code_of, is_4bit
from pykd.nn.selection import CONVOLUTION, EMBEDDING, LINEAR, replace_layer, select_layers
from pykd.quantization.embeddings import check_embeddings, quantize_embeddings
from pykd.quantization.methods import METHODS, Choose, Method, check_group_size, check_method
from pykd.quantization.schemes import Scheme, eight_bit, four_bit
from pykd.training.record import recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)
#: (dense layer, statistics of its inputs) -> packed layer.
Pack = Callable[[nn.Module, Inputs | None], CompressedModule]

#: A packed layer must save this much: describing it costs some hundred bytes of the saved files.
LEAST_SAVING_BYTES = 1024

UNREACHED = "calibration never reached it: give data that uses it, or quantize it with method='rtn'"


def quantize(
    model: Model,
    scheme: str | Scheme = "w4a16",
    *,
    method: str | Choose = "rtn",
    group_size: int | None = 64,
    symmetric: bool = True,
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
            a scale per row and group), "w8a8" (weights in 8 bits, and activations under a scale per row), "w8a16"
            (weights in 8 bits); 4 bits by a table of your own, named by `pykd.nn.codebook_code(16 numbers)`; or a
            function of (dense layer, group size) that returns the packed layer.
        method: how 4-bit codes are chosen. Without data: "rtn", round to nearest; "hqq" (Badri and Shaji 2023), scales
            that outliers do not spoil. By the error of the layer's outputs on ``data``: "gptq" (Frantar et al. 2022),
            codes that make up for each other's errors; "awq" (after Lin et al. 2023), scales only. Or a function like
            these, (weight, inputs, *, code, group_size) -> FourBit, which gets statistics of the inputs when there is
            ``data`` and None when not. Only "rtn" goes with 8 bits.
        group_size: inputs that share a scale in the 4-bit schemes; None: all of an output.
        symmetric: False stores an integer zero point per group; schemes "w4a16" and "w4a8" only.
        data: examples for the methods that look at inputs, not read by "rtn" and "hqq": a DataBundle (its training
            split), or an iterable of batches, as dicts of tensors by input name or as tensors. Labels are not used.
        samples: how many examples; batch_size: how many at once, from a DataBundle; seed: which, from a DataBundle.
        embeddings: scheme of the embeddings, "w4a16", "nf4", "fp4" or "w8a16", by plain rounding; None leaves them as
            they are. "w8a16" goes with any ``scheme``: it costs next to nothing, and embeddings can be half a model.
        include, exclude: shell patterns of layer names, embeddings too; by default all but norms and output heads.

    A weight that an embedding shares with an output projection or with other embeddings is quantized once and stays
    shared: these layers then compute with the embedding's tensors (`pykd.nn.TiedLinear`), under one of the patterns or
    not; excluding one of them leaves all as they are.

    Layers are quantized in the order in which the model runs them, each by the inputs that it gets behind the packed
    ones; the statistics of one input are in memory at a time: 4 * in_features^2 bytes, and a few times that while codes
    are chosen. A layer that calibration never reached, or that would save less than LEAST_SAVING_BYTES, stays as it is
    and is named with the reason in ``model.pykd_report``. Weights that are exactly zero stay so under every method, and
    sparse layers are stored sparse where that is smaller. Packed weights are constants: train before.

    Raises ValueError for an unknown scheme or method or ones that do not go together, a method without the data that it
    needs, numbers out of range, patterns that match nothing, NaN or infinite weights or activations, and data that
    reaches no layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> type(quantize(model, "w4a16", method="gptq", data=[torch.randn(32, 64)])[0]).__name__
    'Linear4bit'
    """
    check_method(scheme, method, symmetric=symmetric)
    check_embeddings(embeddings)
    check_group_size(group_size)
    chosen = Method(method, data is not None) if callable(method) else METHODS[method]
    pack = _packer(scheme, chosen.choose, group_size, symmetric)
    batches = None
    if chosen.calibrated:
        if data is None:
            raise DataError(
                f"method {method!r} looks at the inputs of each layer: pass data=, some hundred examples of what the "
                "model is for; without any, use method='hqq'"
            )
        batches = calibration_batches(data, samples=samples, batch_size=batch_size, seed=seed)
    require_finite_weights(model, "model")
    kinds = (*LINEAR, *CONVOLUTION, *(EMBEDDING if embeddings is not None else ()))
    selection = select_layers(model, kinds, include=include, exclude=exclude)
    parameters = {
        "scheme": _name(scheme),
        "group_size": group_size,
        "symmetric": symmetric,
        "samples": None if batches is None else sum(len(next(iter(batch.values()))) for batch in batches),
        "embeddings": embeddings,
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }
    tables = [name for name, layer in selection.chosen.items() if isinstance(layer, EMBEDDING)]
    names, skipped = [name for name in selection.chosen if name not in tables], selection.skipped
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
            packed, unpacked = _quantize_layers(model, names, pack, batches)
            changed, left = {**changed, **packed}, {**left, **unpacked}
        skipped = {name: reason for name, reason in {**skipped, **left}.items() if name not in changed}
        facts.update(changed=changed, skipped=skipped)
    return model


def _name(choice: Any) -> str:
    return choice if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)


def _packer(scheme: str | Scheme, choose: Choose, group_size: int | None, symmetric: bool) -> Pack:
    """One function from a dense layer to a packed one."""
    if not isinstance(scheme, str) or not is_4bit(scheme):
        make = eight_bit(scheme) if isinstance(scheme, str) else scheme
        return lambda layer, inputs: make(layer, _size(layer, group_size))
    code = code_of(scheme, symmetric=symmetric)

    def pack(layer: nn.Module, inputs: Inputs | None) -> CompressedModule:
        matrix, size = cast(Tensor, layer.weight).detach().flatten(1), _size(layer, group_size)
        tensors = choose(matrix, inputs, code=code, group_size=size)
        return four_bit(layer, tensors, scheme=scheme, group_size=size, symmetric=symmetric)

    return pack


def _size(layer: nn.Module, group_size: int | None) -> int:
    """None is the whole row of the weight matrix."""
    return cast(Tensor, layer.weight)[0].numel() if group_size is None else group_size


def _quantize_layers(
    model: nn.Module, names: Sequence[str], pack: Pack, batches: Sequence[Batch] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What became of each layer, and why others were left."""
    changed: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}

    def visit(name: str, inputs: Inputs | None = None) -> None:
        outcome = _quantize_layer(model, name, pack, inputs)
        if isinstance(outcome, str):
            skipped[name] = outcome
        else:
            changed[name] = outcome

    if batches is None:
        for name in names:
            visit(name)
        return changed, skipped
    skipped.update(dict.fromkeys(calibrate(model, names, batches, visit), UNREACHED))
    if all(reason == UNREACHED for reason in skipped.values()) and not changed:
        raise ValueError(f"calibration reached none of {len(names)} layers: give data=, inputs that the model runs on")
    return changed, skipped


@torch.no_grad()
def _quantize_layer(model: nn.Module, name: str, pack: Pack, inputs: Inputs | None) -> dict[str, Any] | str:
    """Replace one layer; what it saves, or why it was left."""
    layer = model.get_submodule(name)
    before = stored_bytes(layer)
    packed = pack(layer.to_dense() if isinstance(layer, CompressedModule) else layer, inputs)
    after = stored_bytes(packed)
    if before - after < LEAST_SAVING_BYTES:
        return f"would be stored in {after} instead of {before} bytes: no gain"
    replace_layer(model, layer, packed)
    return {"type": type(packed).__name__, "bytes_before": before, "bytes_after": after}


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors in a saved file."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())
