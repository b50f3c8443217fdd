"""What a model shows of itself beside its logits: hidden states, attention maps, feature maps, one vector a row.

Transformers of Hugging Face give them as their own outputs; of convolutional networks, hooks read the last feature map
at each resolution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pykd.models.adapter import auxiliary_losses, call, logits_of, unwrap
from pykd.models.layers import layer_stacks

#: What `observe` can be asked for beside the logits.
KINDS = ("hidden", "attention", "summary")


@dataclass
class View:
    """One pass of a model over a batch. Lists run over stacks (encoder, decoder), then over layers.

    logits (rows, ..., classes). hidden: (rows, positions, width) with the embeddings first, or (rows, channels, height,
    width). attention: (rows, heads, positions, positions). masks: for each stack (rows, positions), True where a
    position counts, or None where all do. summary: (rows, width), the mean of the last states that count. auxiliary:
    losses of the model's own, by name.
    """

    logits: Tensor
    hidden: list[list[Tensor]] = field(default_factory=list)
    attention: list[list[Tensor]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    summary: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module, batch: Mapping[str, Any], wanted: Collection[str] = (), stages: Sequence[str] = ()
) -> View:
    """Logits of a batch and what is ``wanted`` beside them (see KINDS); stages: those of a convolutional network.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    >>> view = observe(model, {"x": torch.ones(2, 3, 5, 5)}, ["hidden"], ["0"])
    >>> view.hidden[0][0].shape
    torch.Size([2, 4, 3, 3])
    """
    if stages:
        return _with_hooks(model, batch, stages)
    if not wanted:
        output = call(model, batch)
        return View(logits_of(model, output), auxiliary=auxiliary_losses(output))
    options = {"output_hidden_states": True} if {"hidden", "summary"} & set(wanted) else {}
    options |= {"output_attentions": True} if "attention" in wanted else {}
    output = call(model, batch, **options)
    view = View(logits_of(model, output), masks=_masks(output, batch), auxiliary=auxiliary_losses(output))
    if "output_hidden_states" in options:
        view.hidden = _stacks(model, output, "hidden_states")
        view.summary = _mean(view.hidden[-1][-1], view.masks[-1])
    if "output_attentions" in options:
        view.attention = _stacks(model, output, "attentions")
    return view


def stages_of(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """Names of the modules whose output is the last feature map (rows, channels, height, width) at each resolution.

    [] for a transformer, whose layers are known. Raises ValueError for a model with neither.
    """
    model = unwrap(model)
    if hasattr(getattr(model, "config", None), "to_dict") and layer_stacks(model):
        return []
    last: dict[tuple[int, ...], str] = {}
    names = {module: name for name, module in model.named_modules() if name}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            last[tuple(output.shape[2:])] = names[module]

    handles = [module.register_forward_hook(hook) for module in names]
    training = model.training
    try:
        with torch.no_grad():
            call(model.eval(), batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not last:
        raise ValueError(
            f"{type(model).__name__} shows neither layers of a transformer nor feature maps; distil it by its logits"
        )
    return list(last.values())


@contextmanager
def eager_attention(*models: nn.Module) -> Iterator[None]:
    """Attention that computes its maps, by transformers' own switch, and what it was before afterwards."""
    owners: list[Any] = [inner for model in models if hasattr(inner := unwrap(model), "set_attn_implementation")]
    before = [owner.config._attn_implementation for owner in owners]
    try:
        for owner in owners:
            owner.set_attn_implementation("eager")
        yield
    finally:
        for owner, name in zip(owners, before, strict=True):
            owner.set_attn_implementation(name)


def _with_hooks(model: nn.Module, batch: Mapping[str, Any], stages: Sequence[str]) -> View:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    inner = unwrap(model)
    handles = [inner.get_submodule(name).register_forward_hook(keep(name)) for name in stages]
    try:
        output = call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    maps = [found[name] for name in stages]
    return View(logits_of(model, output), [maps], masks=[None], summary=maps[-1].mean((2, 3)))


def _stacks(model: nn.Module, output: Any, kind: str) -> list[list[Tensor]]:
    single = getattr(output, kind, None)
    sides = (getattr(output, f"{side}_{kind}", None) for side in ("encoder", "decoder"))
    parts = [single] if single is not None else [part for part in sides if part is not None]
    if not parts:
        raise ValueError(f"{type(unwrap(model)).__name__} shows no {kind.replace('_', ' ')}: distil it by other losses")
    return [list(part) for part in parts]


def _masks(output: Any, batch: Mapping[str, Any]) -> list[Tensor | None]:
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    seen = mask.bool() if isinstance(mask, Tensor) else None
    if getattr(output, "encoder_last_hidden_state", None) is None:
        return [seen]
    said = labels != -100 if isinstance(labels, Tensor) and "decoder_input_ids" not in batch else None
    return [seen, said]


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return states.mean(1)
    counted = mask.unsqueeze(-1).to(states.dtype)
    return (states * counted).sum(1) / counted.sum(1).clamp_min(1)
