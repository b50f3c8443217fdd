"""Quantization-aware training: `prepare_qat`, then any training, then `convert_qat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from pykd.errors import nearest
from pykd.nn import (
    Conv2d4bit,
    Conv2d8bit,
    Conv2d16bit,
    Linear4bit,
    Linear8bit,
    Linear16bit,
    SparseConv2d,
    SparseLinear,
)
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT
from pykd.nn.fake_quantized import FakeQuantized, QATConv2d, QATLinear
from pykd.nn.linear_4bit import SCHEMES_4BIT, is_4bit
from pykd.nn.selection import CONVOLUTION, LINEAR, replace_layer, select_layers
from pykd.ops.int4_r16 import CODEBOOK
from pykd.ops.linear_8bit import SCHEMES_8BIT
from pykd.quantization.methods import check_group_size, check_method
from pykd.quantization.packing import stored_bytes
from pykd.quantization.quantize import LEAST_SAVING_BYTES
from pykd.quantization.zeros import sentences, worth
from pykd.training.record import add_record, recorded_change, require_finite_weights

Model = TypeVar("Model", bound=nn.Module)

#: Schemes whose packed arithmetic the trainable layers follow.
QAT_SCHEMES: tuple[str, ...] = (*SCHEMES_4BIT, *SCHEMES_8BIT, *SCHEMES_16BIT)

#: Packed layers that are unpacked to be trained in fewer bits.
PACKED = (Linear4bit, Linear8bit, Linear16bit, Conv2d4bit, Conv2d8bit, Conv2d16bit)


def check_qat(scheme: object, *, group_size: int | None = 64, symmetric: bool = True) -> None:
    """Raise ValueError for a scheme that cannot be trained, or options that do not go with it.

    >>> check_qat("nf4")
    """
    if scheme not in QAT_SCHEMES and not is_4bit(scheme):
        raise ValueError(nearest("scheme for quantization-aware training", scheme, (*QAT_SCHEMES, CODEBOOK)))
    check_group_size(group_size)
    check_method(scheme, "rtn", symmetric=symmetric)


def prepare_qat(
    model: Model,
    scheme: str = "w4a16",
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    search_every: int = 50,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Model:
    """Let training see the rounding (Jacob et al. 2018, section 3): changes ``model`` in place; returns it.

    The Linear and Conv2d layers compute with rounded weights, in w8a8 and w4a8 with rounded activations too, as the
    packed layers will; the parameters stay dense and gradients pass the rounding. Train with `finetune`, `distill` or
    a loop of your own, with checkpoints as ever, then call `convert_qat`: the packed layers hold bit for bit the
    weights that the prepared ones compute with. Embeddings: `quantize(embeddings=...)`, before or after. Layers that
    are packed already, in more bits, are unpacked and trained on in fewer, as `quantize_progressively` does.

    Args:
        scheme: as for `quantize`, by name.
        group_size: inputs that share a scale in the 4-bit schemes; None: all of an output.
        symmetric: False stores an integer zero point per group; schemes "w4a16" and "w4a8" only.
        search_every: forward passes in training mode from one search for the 4-bit scales to the next, >= 1; 1 searches
            in each, which can double the time of a step.
        include, exclude: shell patterns of layer names; by default all but embeddings, norms and output heads.

    Pruned weights of sparse layers stay exactly zero. A layer that would save less than 1 KiB stays as it is.

    Raises ValueError for an unknown scheme, options that do not go with it, patterns that match nothing, NaN or
    infinite weights.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> prepare_qat(model, "w4a16")[0]
    QATLinear(in_features=64, out_features=64, bias=True, scheme=w4a16, group_size=64)
    """
    check_qat(scheme, group_size=group_size, symmetric=symmetric)
    if isinstance(search_every, bool) or not isinstance(search_every, int) or search_every < 1:
        raise ValueError(f"search_every is a number of forward passes, at least 1, got {search_every!r}")
    require_finite_weights(model, "model")
    selection = select_layers(model, (*LINEAR, *CONVOLUTION, *PACKED), include=include, exclude=exclude)
    options: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "symmetric": symmetric}
    chosen, skipped = list(selection.chosen), dict(selection.skipped)
    del selection
    for name in chosen:
        layer = model.get_submodule(name)
        prepared = _prepared(layer, {**options, "search_every": search_every})
        before, after = stored_bytes(layer), stored_bytes(prepared.convert())
        if before - after < LEAST_SAVING_BYTES:
            skipped[name] = f"would be stored in {after} instead of {before} bytes: no gain"
        else:
            replace_layer(model, layer, prepared)
    options |= {"search_every": search_every}
    options |= {"include": None if include is None else list(include)}
    options |= {"exclude": None if exclude is None else list(exclude)}
    changed = [name for name in chosen if name not in skipped]
    add_record(model, stage="prepare_qat", method="qat", parameters=options, changed=changed, skipped=skipped)
    return model


def convert_qat(model: Model) -> Model:
    """Pack what `prepare_qat` prepared, in place; returns ``model``, recorded in ``pykd_report`` as a quantization.

    The packed weights are bit for bit those that a forward pass computes with before. Raises ValueError for a model
    that has no prepared layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> convert_qat(prepare_qat(model, "w8a8"))[0]
    Linear8bit(in_features=64, out_features=64, bias=True, scheme=w8a8)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantized)}
    if not layers:
        raise ValueError(
            "the model has no layer prepared for quantization-aware training: call prepare_qat first, which leaves "
            f"layers that would save less than {LEAST_SAVING_BYTES} bytes as they are"
        )
    first = next(iter(layers.values()))
    parameters = {name: getattr(first, name) for name in ("scheme", "group_size", "symmetric", "search_every")}
    with recorded_change(model, stage="quantize", method="qat", parameters=parameters) as facts:
        changed = {name: _convert(model, layer) for name, layer in layers.items()}
        facts.update(changed=changed, skipped={}, notes=sentences(model, changed, {}))
    return model


def _prepared(layer: nn.Module, options: dict[str, Any]) -> QATLinear | QATConv2d:
    kept = None
    if isinstance(layer, (SparseLinear, SparseConv2d)):
        dense = layer.to_dense()
        kept = layer.mask.view(dense.weight.shape)
        layer = dense.train(layer.training)
    elif isinstance(layer, PACKED):
        dense = layer.to_linear() if isinstance(layer, (Linear4bit, Linear8bit, Linear16bit)) else layer.to_conv2d()
        kept = None if layer.nnz is None else dense.weight.detach() != 0  # pruned before it was packed
        layer = dense.train(layer.training)
    if isinstance(layer, nn.Conv2d):
        return QATConv2d.from_conv2d(layer, kept=kept, **options)
    assert isinstance(layer, nn.Linear)
    return QATLinear.from_linear(layer, kept=kept, **options)


@torch.no_grad()
def _convert(model: nn.Module, layer: FakeQuantized) -> dict[str, Any]:
    packed = layer.convert()
    replace_layer(model, layer, packed)
    before = sum(parameter.nbytes for parameter in layer.parameters())
    zeros = {} if layer.kept is None else {"zeros": worth(packed)}
    return {"type": type(packed).__name__, "bytes_before": before, "bytes_after": stored_bytes(packed), **zeros}
