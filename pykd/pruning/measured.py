"""How much whole units matter, measured on examples: by what they let through, or by what their removal would cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.calibration import Batch
from pykd.calibration.inputs import unpadded_rows
from pykd.errors import DataError
from pykd.models.adapter import call, move, num_classes
from pykd.training.finetune import label_loss


@torch.no_grad()
def activations(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch]) -> dict[nn.Module, Tensor]:
    """Mean absolute value of every input feature, or channel, of these layers on the batches; padding left out.

    Raises ValueError when the batches reach none of the layers.
    """
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}
    mask: Tensor | None = None

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0].detach()
        rows = x.movedim(1, -1).flatten(0, -2) if isinstance(layer, nn.Conv2d) else unpadded_rows(x, mask)[0]
        sums[layer] = sums.get(layer, 0) + rows.float().abs().sum(0)
        counts[layer] = counts.get(layer, 0) + len(rows)

    with _evaluating(model), contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        for batch in batches:
            found = batch.get("attention_mask")
            mask = found if isinstance(found, Tensor) and found.dim() == 2 else None
            call(model, move(batch, next(model.parameters()).device))
    if not sums:
        raise ValueError("the examples reach none of the layers that are to be pruned: give data that uses them")
    return {layer: total / max(1, counts[layer]) for layer, total in sums.items()}


def taylor(
    model: nn.Module, gates: Mapping[nn.Module, Callable[[Tensor], Tensor]], batches: Sequence[Batch]
) -> dict[nn.Module, Tensor]:
    """First-order cost of removing a unit, ``(sum of g * w)^2``, mean over the batches (Molchanov et al. 2019, eq. 8).

    The sum runs over the weights that make up the unit's gate, g is the gradient of the batch's cross entropy.

    Args:
        gates: layer -> function that adds up ``g * w`` of its weight over each unit.
        batches: with labels, as `finetune` takes them.

    Raises DataError for a batch without labels.
    """
    totals: dict[nn.Module, Tensor] = {}
    classes, device = num_classes(model), next(model.parameters()).device
    with _evaluating(model), _trainable(gates):
        for batch in batches:
            if "labels" not in batch:
                raise DataError("importance='taylor' needs examples with labels; 'activation' does without")
            weights: list[Any] = [layer.weight for layer in gates]
            loss = label_loss(model, move(batch, device), classes=classes)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for (layer, gate), weight, gradient in zip(gates.items(), weights, gradients, strict=True):
                product = 0 * weight if gradient is None else gradient * weight
                totals[layer] = totals.get(layer, 0) + gate(product.detach().float()).square() / len(batches)
    return totals


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _trainable(layers: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Gradients of these weights even where they are frozen."""
    weights: list[Any] = [layer.weight for layer in layers]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
