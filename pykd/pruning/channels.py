"""Channel pruning: whole channels of convolutional networks, removed physically."""

from __future__ import annotations

from torch import Tensor, nn

from pykd.nn.channels import Values, default_example, remove_channels, weight_norms
from pykd.nn.selection import matches
from pykd.pruning.measured import activations, taylor
from pykd.pruning.outcome import Outcome, Request


def prune_channels(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest channels of every group of layers that share them (Li et al. 2017, Fang et al. 2023).

    By default by the L2 norm of their weights. A group is left alone when include does not name all, or exclude names
    one, of the convolutions that make it.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    skipped: dict[str, str] = {}
    for name in convs:
        excluding = next((pattern for pattern in request.exclude or () if matches(name, pattern)), None)
        if excluding is not None:
            skipped[name] = f"excluded by {excluding!r}"
        elif request.include is not None and not any(matches(name, pattern) for pattern in request.include):
            skipped[name] = "not included"
    example = default_example(model) if request.example is None else request.example
    keep = [convs[name] for name in skipped]
    changed = remove_channels(model, example, request.sparsity, keep_layers=keep, values=_values(model, request))
    return Outcome(changed=dict(changed), skipped=skipped, units=[name.split(", ") for name in changed])


def _values(model: nn.Module, request: Request) -> Values:
    """What each layer says of its channels. Those that read a channel know its activation, convolutions that make it
    what their outputs cost."""
    if request.importance in ("l1", "l2"):
        return weight_norms(int(request.importance[1]))
    batches = request.batches(f"importance={request.importance!r}")
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if request.importance == "activation":
        read = activations(model, layers, batches)
        return lambda module, produces: None if produces else read.get(module)
    costs = taylor(model, {layer: _gate for layer in layers if not isinstance(layer, nn.Linear)}, batches)
    return lambda module, produces: costs.get(module) if produces else None


def _gate(product: Tensor) -> Tensor:
    return product.flatten(1).sum(1)
