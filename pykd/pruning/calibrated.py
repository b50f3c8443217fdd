"""Pruning layer after layer, each by the inputs that it gets behind the pruned ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pykd.calibration import Batch, Inputs, calibrate
from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.weights import make_sparse, matrix_of, select_weights

UNREACHED = "the examples never reached it: give data that uses it, or prune it with method='magnitude'"

#: (weight matrix, statistics of its inputs, name) -> new weight matrix, mask (True = kept).
Choose = Callable[[Tensor, Inputs, str], tuple[Tensor, Tensor]]


@torch.no_grad()
def prune_layer_by_layer(model: nn.Module, request: Request, batches: list[Batch], choose: Choose) -> Outcome:
    """Let ``choose`` decide for one layer after another; the statistics of one input at a time are in memory."""
    selection = select_weights(model, include=request.include, exclude=request.exclude, pattern=request.pattern)
    outcome, names = Outcome(skipped=selection.skipped), list(selection.chosen)
    del selection

    def visit(name: str, inputs: Inputs) -> None:
        layer = model.get_submodule(name)
        weight, mask = choose(matrix_of(layer), inputs, name)
        make_sparse(model, name, layer, mask, request, outcome, weight)

    unreached = calibrate(model, names, batches, visit)
    if len(unreached) == len(names):
        raise ValueError(f"the examples reached none of {len(names)} layers: give data=, inputs that the model runs on")
    outcome.skipped.update(dict.fromkeys(unreached, UNREACHED))
    return outcome
