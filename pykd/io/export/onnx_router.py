"""The choices of a router in ONNX: written beside the logits, and held against those of the model.

A router chooses twice, a branch for each row and experts for each token of the rows that go deep. Where two are as
good, the order of a float32 sum decides, and from there on the logits are those of another branch or expert. So the
logits are compared for the same choices, and every choice that differs must have been that close.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[[Any, tuple[Tensor], Tensor], Tensor]

ROUTER, SCORES, EXPERTS = "pykd-router", "scores", "expert_choices"
#: Choices -> what those are called that differ.
COUNTED = {SCORES: "rows_at_threshold", EXPERTS: "tokens_between_experts"}


def choices_of(model: nn.Module) -> list[str]:
    """Names of the outputs that a graph of the model has beside its logits: scores of rows, experts of tokens."""
    config: Any = getattr(model, "config", None)
    inner: Any = model
    parts = inner.parts() if getattr(config, "model_type", "") == ROUTER else {}
    return [name for name, part in ((SCORES, "router"), (EXPERTS, "experts")) if part in parts]


@dataclass
class Differences:
    """differing: how many choices differ, rows between branches and tokens between experts. largest: the largest
    difference of scores that they take, as a share of the absolute values that a score is the sum of."""

    differing: dict[str, int]
    largest: float = 0.0

    def note(self, name: str, differing: Tensor, gaps: Tensor, terms: Tensor) -> None:
        """Take in choices: which differ, and the differences of their scores."""
        self.differing[COUNTED[name]] += int(differing.sum())
        if len(gaps):
            self.largest = max(self.largest, float((gaps / terms.clamp_min(1e-12)).max()))


@contextlib.contextmanager
def made(model: nn.Module, batch: Mapping[str, Tensor], choices: Mapping[str, Tensor]) -> Iterator[Differences]:
    """Within, the router makes the given ``choices`` on ``batch``, and notes those that it would have made otherwise.

    choices: what a graph gave, "scores" (rows,) and "expert_choices" (deep layers, rows that went deep * positions,
    experts per token), or neither for a model without.
    """
    inner: Any = model
    found = Differences({COUNTED[name]: 0 for name in choices})
    with contextlib.ExitStack() as stack:
        if SCORES in choices:
            branches = _branches(choices[SCORES], inner.config.threshold, found)
            stack.callback(inner.router[-1].register_forward_hook(branches).remove)
        if EXPERTS in choices:
            seen = batch["attention_mask"].bool()
            deep = choices[SCORES] > inner.config.threshold if SCORES in choices else seen.any(-1)
            for layer, chosen in zip(inner.body.deep, choices[EXPERTS], strict=True):
                experts = _experts(chosen.view(-1, seen.shape[1], chosen.shape[-1])[seen[deep]], found)
                stack.callback(layer.feed_forward.gate.register_forward_hook(experts).remove)
        yield found


def _branches(scores: Tensor, threshold: float, found: Differences) -> Hook:
    """A hook of the layer that scores rows: ``scores`` instead of its own."""

    def hook(layer: Any, inputs: tuple[Tensor], own: Tensor) -> Tensor:
        given = scores[:, None].to(own.dtype)
        other = (own > threshold) != (given > threshold)
        found.note(SCORES, other, (own - given).abs(), _terms(layer, inputs[0]))
        return given

    return hook


def _experts(chosen: Tensor, found: Differences) -> Hook:
    """A hook of a gate: only the ``chosen`` experts (tokens, experts per token) can be chosen."""

    def hook(layer: Any, inputs: tuple[Tensor], own: Tensor) -> Tensor:
        allowed = torch.zeros_like(own, dtype=torch.bool).scatter(-1, chosen, True)
        best = own.topk(chosen.shape[-1], dim=-1).values[:, -1]
        given = own.masked_fill(~allowed, -torch.inf)
        gaps = best - own.masked_fill(~allowed, torch.inf).amin(-1)  # the worst of its choices, and of those given
        found.note(EXPERTS, gaps > 0, gaps, _terms(layer, inputs[0]).amax(-1))
        return given

    return hook


def _terms(layer: Any, inputs: Tensor) -> Tensor:
    """Sums of the absolute values of what a linear layer adds up."""
    added: Tensor = inputs.abs() @ layer.weight.abs().T
    return added if layer.bias is None else added + layer.bias.abs()
