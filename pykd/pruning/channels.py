"""Channel pruning: whole channels of convolutional networks, removed physically."""

from __future__ import annotations

from torch import nn

from pykd.nn.channels import default_example, remove_channels
from pykd.nn.selection import matches
from pykd.pruning.outcome import Outcome, Request


def prune_channels(model: nn.Module, request: Request) -> Outcome:
    """Remove the weakest channels of every group of layers that share them (L2 norm; Li et al. 2017, Fang et al. 2023).

    A group is left alone when include does not name all, or exclude names one, of the convolutions that make it.
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
    changed = remove_channels(model, example, request.sparsity, keep_layers=[convs[name] for name in skipped])
    return Outcome(changed=dict(changed), skipped=skipped)
