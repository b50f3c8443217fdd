"""What quantization would give beside pruning: time and bytes of a layer, measured and not applied."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pykd.nn.linear_4bit import Linear4bit
from pykd.nn.linear_8bit import Linear8bit
from pykd.ops.bitmask import PackedSparse, bitmask_expand
from pykd.ops.sparse_route import Case, case_of
from pykd.ops.sparse_tuning import activations, alternate

_known: dict[tuple[Case, int], dict[str, float]] = {}


@torch.no_grad()
def quantized_times(packed: PackedSparse, rows: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Scheme -> `us`, rows -> microseconds of a call with so many rows of activations, and `bytes` in a file.

    The schemes are w8a8 and w4a16 (groups of 32) of the same pruned weight, on the CPU and with the native module.
    Times are measured once in a process for weights of one shape and density (`pykd.ops.sparse_tuning.alternate`).

    >>> from pykd.nn.codecs.bitmask import pack
    >>> sorted(quantized_times(pack(torch.eye(64)), rows=(1,)))
    ['w4a16', 'w8a8']
    """
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(bitmask_expand(packed).float(), requires_grad=False)
    layers: dict[str, nn.Module] = {"w8a8": Linear8bit.from_linear(linear), "w4a16": Linear4bit.from_linear(linear)}
    case = case_of(packed.density, packed.out_features, packed.in_features, "quantized")
    for number in rows:
        if (case, number) not in _known:
            x = activations(number, packed.in_features)
            _known[case, number] = alternate({name: functools.partial(layer, x) for name, layer in layers.items()})
    return {
        name: {
            "us": {str(number): round(_known[case, number][name], 1) for number in rows},
            "bytes": sum(tensor.nbytes for tensor in layer.state_dict().values()),
        }
        for name, layer in layers.items()
    }
