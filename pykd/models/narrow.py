"""A narrower transformer made of slices of a wide one: one choice of channels for the whole residual stream.

The smaller configuration builds a network of the same architecture; wherever one of its tensors is smaller than the
teacher's, the axis is one of a few kinds: channels of the residual stream, heads, channels inside a head, neurons.
Each kind is cut everywhere by the same indices, so that what is kept still fits together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pykd.models.adapter import call, move, skeleton
from pykd.nn.slicing import ATTENTION, feed_forward_blocks, linears_at, neuron_scores, strongest

#: T5's projections; heads of a stack share one table of position biases.
PROJECTIONS = (*ATTENTION.values(), ("q", "k", "v", "o"))
HEAD_SIZE = ("attention_head_size", "head_dim", "key_value_proj_dim")

#: Name of a tensor -> axis -> indices kept.
Cuts = dict[str, dict[int, Tensor]]


@torch.no_grad()
def narrowed(teacher: nn.Module, config: Any, *, batches: Sequence[Mapping[str, Any]] | None = None) -> nn.Module:
    """The model that ``config`` describes, of the teacher's class, filled with the teacher's most important slices.

    Heads and neurons are ranked by the L2 norm of all their weights. Channels of the residual stream are ranked by the
    mean size of the normalised activations over ``batches`` (Minitron, Muralidharan et al. 2024, section 2.2), or
    without data by the share of the squared weights that read or write them, every tensor counting alike. Where heads
    get narrower, query weights are scaled by sqrt(new / old), so that scores stay those of the kept channels.

    Raises ValueError for a teacher that its own configuration does not describe, and for a size that cannot be sliced.
    """
    state = teacher.state_dict()
    for name, tensor in skeleton(teacher).state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} of the teacher has another shape than its configuration says; cut the teacher as it was "
                "before pruning and quantization, or use width= and depth="
            )
    with torch.random.fork_rng(devices=[]):
        student: nn.Module = type(teacher)(config)
    first = next(teacher.parameters())
    student.to(device=first.device, dtype=first.dtype)
    cuts = _neuron_cuts(teacher, student) | _attention_cuts(teacher, student)
    smaller = student.state_dict()
    if smaller.keys() != state.keys():
        other = sorted(smaller.keys() ^ state.keys())[0]
        raise ValueError(f"{other!r} is not in both, the teacher and a {type(teacher).__name__} of that size")
    channels = _channels(teacher, smaller, cuts, batches)
    for name, target in smaller.items():
        value = state[name]
        for axis in _changed(value, target):
            index = cuts.get(name, {}).get(axis, channels)
            if index is None or len(index) != target.shape[axis]:
                raise ValueError(
                    f"axis {axis} of {name!r} cannot be cut from {value.shape[axis]} to {target.shape[axis]}"
                )
            value = value.index_select(axis, index.to(value.device))
        target.copy_(value)
    _rescale_queries(teacher, student)
    return student.train(teacher.training)


def _changed(old: Tensor, new: Tensor) -> list[int]:
    return [axis for axis in range(new.dim()) if old.shape[axis] != new.shape[axis]]


def _channels(
    teacher: nn.Module, smaller: dict[str, Tensor], cuts: Cuts, batches: Sequence[Mapping[str, Any]] | None
) -> Tensor | None:
    """Channels of the residual stream that are kept; None where its width stays."""
    state = teacher.state_dict()
    free = [
        (state[name], axis, target.shape[axis])
        for name, target in smaller.items()
        for axis in _changed(state[name], target)
        if axis not in cuts.get(name, {})
    ]
    if not free:
        return None
    width, count = free[0][0].shape[free[0][1]], free[0][2]
    if batches:
        scores = _activation_scores(teacher, width, batches)
    else:
        scores = torch.zeros(width, dtype=torch.float64)
        for tensor, axis, _ in free:
            if tensor.shape[axis] == width:
                energy = tensor.double().square().movedim(axis, 0).reshape(width, -1).sum(1).cpu()
                scores += energy / energy.sum().clamp_min(1e-30)
    return torch.tensor(strongest(scores, count))


def _activation_scores(teacher: nn.Module, width: int, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean absolute output of every normalisation of the residual stream; float64 [width]."""
    scores = torch.zeros(width, dtype=torch.float64)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == width:
            scores.add_(output.double().abs().flatten(0, -2).mean(0).cpu())

    norms = [module for module in teacher.modules() if "Norm" in type(module).__name__]
    handles = [module.register_forward_hook(hook) for module in norms]
    training = teacher.training
    try:
        teacher.eval()
        for batch in batches:
            call(teacher, move(batch, next(teacher.parameters()).device))
    finally:
        teacher.train(training)
        for handle in handles:
            handle.remove()
    return scores


def _neuron_cuts(teacher: nn.Module, student: nn.Module) -> Cuts:
    cuts: Cuts = {}
    names = {module: name for name, module in teacher.named_modules()}
    for mine, its in zip(feed_forward_blocks(student), feed_forward_blocks(teacher), strict=True):
        if mine.units == its.units:
            continue
        kept = torch.tensor(strongest(neuron_scores(its), mine.units))
        for layer in its.inputs:
            cuts |= _rows(names[layer], kept)
        cuts[f"{names[its.output]}.weight"] = {1: kept}
    return cuts


def _attention_cuts(teacher: nn.Module, student: nn.Module) -> Cuts:
    cuts: Cuts = {}
    bias = {name.rpartition(".")[0]: name for name, _ in teacher.named_modules() if name.endswith("_attention_bias")}
    shared: dict[str, Tensor] = {}  # heads of the blocks that read one table of position biases
    for group, blocks in _attentions(teacher).items():
        for _, layers, head_size in blocks:
            if group in {_group(owner) for owner in bias}:
                shared[group] = shared.get(group, torch.zeros(())) + _head_energy(layers, head_size)
    for group, blocks in _attentions(teacher).items():
        for name, layers, head_size in blocks:
            new = student.get_submodule(name)
            mine = next(found for names in PROJECTIONS if (found := linears_at(new, names)) is not None)
            size = _head_size(new, mine)
            energy = shared.get(group, _head_energy(layers, head_size))
            heads, picks = _pick(layers, [layer.out_features // size for layer in mine], head_size, size, energy)
            names = {module: f"{name}.{path}" for path, module in teacher.get_submodule(name).named_modules()}
            for layer, rows in zip(layers[:3], picks[:3], strict=True):
                cuts |= _rows(names[layer], rows)
            cuts[f"{names[layers[3]]}.weight"] = {1: picks[3]}
            if name in bias:
                cuts[f"{bias[name]}.weight"] = {1: heads}
    return cuts


def _rows(name: str, kept: Tensor) -> Cuts:
    return {f"{name}.weight": {0: kept}, f"{name}.bias": {0: kept}}


def _attentions(model: nn.Module) -> dict[str, list[tuple[str, list[nn.Linear], int]]]:
    """Attention blocks (name, projections, head width) by the place they have in the layers of their stack."""
    found: dict[str, list[tuple[str, list[nn.Linear], int]]] = {}
    for name, module in model.named_modules():
        for names in PROJECTIONS:
            layers = linears_at(module, names)
            size = 0 if layers is None else _head_size(module, layers)
            if layers is not None and size:
                found.setdefault(_group(name), []).append((name, layers, size))
                break
    return found


def _group(name: str) -> str:
    """The name of a block without the number of its layer (the first number in it)."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join([*parts[:number], *parts[number + 1 :]])


def _head_size(module: nn.Module, layers: list[nn.Linear]) -> int:
    holders = [owner for owner in module.modules() if layers[0] in owner.children()] + [module]
    sizes = (getattr(holder, name, None) for holder in holders for name in HEAD_SIZE)
    return next((size for size in sizes if isinstance(size, int)), 0)


def _head_energy(layers: list[nn.Linear], size: int) -> Tensor:
    """Sum of squares of query rows and output columns of each query head; float32 [heads]."""
    heads = layers[0].out_features // size
    rows = layers[0].weight.float().square().sum(1) + layers[3].weight.float().square().sum(0)
    return rows.view(heads, size).sum(1)


def _pick(
    layers: list[nn.Linear], counts: list[int], old: int, new: int, energy: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Query heads kept, and the rows of query, key and value and the columns of the output that go with them.

    counts: heads of query, key, value of the student. old, new: channels of a head.
    """
    heads, keys = layers[0].out_features // old, layers[1].out_features // old
    if counts[0] > heads or new > old:
        raise ValueError(
            f"{counts[0]} heads of {new} channels cannot be cut from the teacher's {heads} of {old}: ask for heads "
            f"of at most {old} channels (hidden_size / heads), or remove heads by width="
        )
    per_key = heads // keys
    units = strongest(energy.view(keys, per_key).sum(1), counts[1])
    inside = [strongest(energy.view(keys, per_key)[unit], counts[0] // counts[1]) for unit in units]
    query_heads = [(at, unit * per_key + head) for at, unit in enumerate(units) for head in inside[at]]
    q, k, v = (layer.weight.float().square().sum(1).view(-1, old) for layer in layers[:3])
    o = layers[3].weight.float().square().sum(0).view(-1, old)
    group = [torch.arange(unit * per_key, (unit + 1) * per_key) for unit in units]
    scored = [strongest(q[group[at]].sum(0) + k[unit], new) for at, unit in enumerate(units)]
    mixed = [strongest(o[group[at]].sum(0) + v[unit], new) for at, unit in enumerate(units)]
    rows = [
        [head * old + channel for at, head in query_heads for channel in scored[at]],
        [unit * old + channel for at, unit in enumerate(units) for channel in scored[at]],
        [unit * old + channel for at, unit in enumerate(units) for channel in mixed[at]],
        [head * old + channel for at, head in query_heads for channel in mixed[at]],
    ]
    return torch.tensor([head for _, head in query_heads]), [torch.tensor(part) for part in rows]


def _rescale_queries(teacher: nn.Module, student: nn.Module) -> None:
    old = {name: size for blocks in _attentions(teacher).values() for name, _, size in blocks}
    for blocks in _attentions(student).values():
        for name, layers, size in blocks:
            for tensor in (layers[0].weight, layers[0].bias):
                if tensor is not None and size != old[name]:
                    tensor.mul_(math.sqrt(size / old[name]))
