"""Physical removal of channels of convolutional networks, through residuals, depthwise convolutions and norms.

Which slices must go together is found by Torch-Pruning's dependency graph (Fang et al. 2023, DepGraph); the scores,
what may be touched and the record of what changed are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pykd.nn.restored import restored_on_error
from pykd.nn.slicing import attention_blocks, kept_count, strongest

Example = Tensor | dict[str, Tensor]
#: (layer, whether it produces the channels) -> a value per output or input channel, None where it has no say
Values = Callable[[nn.Module, bool], Tensor | None]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that exist together in several layers. layers: the convolutions that produce them."""

    root: nn.Module
    prune: Callable[..., Any]
    layers: tuple[str, ...]
    energy: Tensor  # [members, channels] what each member says of each channel, its squared L2 norm for instance
    blocks: int  # grouped convolutions need the same channels kept in each of so many blocks

    @property
    def channels(self) -> int:
        """Channels before removal."""
        return self.energy.shape[1]


def group_magnitude(energy: Tensor) -> Tensor:
    """Mean over the layers of a group of each channel's share of that layer's squared L2 norm, or values; [channels].

    Shares, because one layer's weights may be many times another's without mattering more (batch norm cancels scale).
    """
    return (energy / energy.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).mean(0)


def weight_norms(norm: int) -> Values:
    """Sum of |w|^norm over a layer's slice of each channel, for convolutions, linear layers and batch norms.

    >>> weight_norms(1)(nn.BatchNorm2d(3), True)
    tensor([1., 1., 1.])
    """

    def values(module: nn.Module, produces: bool) -> Tensor | None:
        weight: Tensor | None = getattr(module, "weight", None)
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) or weight is None:
            return None
        powers = weight.detach().float().abs().pow(norm)
        if isinstance(module, nn.BatchNorm2d):
            return powers
        if produces:
            return powers.flatten(1).sum(1)
        columns = powers.transpose(0, 1).flatten(1).sum(1)
        return columns.repeat(module.groups) if isinstance(module, nn.Conv2d) else columns

    return values


def remove_channels(
    model: nn.Module,
    example: Example,
    sparsity: float,
    *,
    keep_layers: Collection[nn.Module] = (),
    values: Values | None = None,
) -> dict[str, list[int]]:
    """Remove the share ``sparsity`` (0..1) of the channels of every group, weakest first; in place.

    example: one batch the model accepts (a tensor, or a dict of its inputs). keep_layers: layers whose outputs must
    stay as they are; the network's outputs always do. values: what each layer says of each channel, combined by
    `group_magnitude`; by default its squared L2 norm. Returns ``{"layer, layer": [channels before, after]}``.
    Raises ValueError for a model whose channels are a transformer's residual stream, or that has no convolution.
    """
    if attention_blocks(model) or any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is a transformer: its channels are one residual stream; "
            "use method='heads', method='neurons' or method='magnitude'"
        )
    graph = _graph(model, example)
    groups = _groups(graph, model, set(keep_layers) | _outputs(graph, model), values or weight_norms(2))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no group of convolution channels that may be removed")
    changed: dict[str, list[int]] = {}
    with restored_on_error(model):
        for group in groups:
            drop = _weakest(group_magnitude(group.energy), group.blocks, sparsity)
            if drop:
                graph.get_pruning_group(group.root, group.prune, drop).prune()
                changed[", ".join(group.layers)] = [group.channels, group.channels - len(drop)]
        try:
            _run(model, example)
        except Exception as error:
            raise ValueError(
                f"what is left of {type(model).__name__} without these channels does not fit together ({error}): "
                "nothing was changed; exclude the layers that it names, or use method='magnitude'"
            ) from error
    return changed


def _weakest(scores: Tensor, blocks: int, sparsity: float) -> list[int]:
    """Channels to remove; a grouped convolution loses the same ones in each of its blocks."""
    per_block = len(scores) // blocks
    kept = set(strongest(scores.view(blocks, per_block).mean(0), kept_count(per_block, sparsity)))
    return [block * per_block + i for block in range(blocks) for i in range(per_block) if i not in kept]


def default_example(model: nn.Module, size: int = 64) -> Tensor:
    """A black image of ``size`` pixels for the model's first convolution, on its device."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no convolution: pass example=, one batch that the model accepts")
    return torch.zeros(1, first.in_channels, size, size, device=first.weight.device, dtype=first.weight.dtype)


def _graph(model: nn.Module, example: Example) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("removing channels needs torch-pruning: pip install 'pykd[vision]'") from error
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    was_training = model.training
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(model, example, forward_fn=_logits, verbose=False)
    except Exception as error:
        instead = "it runs on the example, but Torch-Pruning does not know all that it does; use method='magnitude'"
        try:
            _run(model, example)
        except Exception:
            instead = "pass an example that the model accepts, or prune it with method='magnitude'"
        raise ValueError(
            f"cannot follow the channels of {type(model).__name__} from layer to layer ({error!r}): {instead}"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(was_training)


def _logits(model: nn.Module, example: Example) -> Any:
    """What the model makes of the example: logits, or whatever it returns."""
    if isinstance(example, dict):
        images = {name: tensor for name, tensor in example.items() if name != "labels"}
        out = model(**images) if hasattr(model, "config") else model(images["pixel_values"])
    else:
        out = model(example)
    return getattr(out, "logits", out)


def _run(model: nn.Module, example: Example) -> None:
    """One forward pass; raises what the model's own code does where its layers do not fit together."""
    was_training = model.training
    try:
        with torch.inference_mode():
            _logits(model.eval(), example)
    finally:
        model.train(was_training)


def _outputs(graph: Any, model: nn.Module) -> set[nn.Module]:
    """Layers whose output is the network's: nothing consumes it."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m in graph.module2node]
    return {layer for layer in layers if not _reaches_layer(graph.module2node[layer])}


def _reaches_layer(node: Any) -> bool:
    stack, seen = list(node.outputs), set()
    while stack:
        current = stack.pop()
        if isinstance(current.module, (nn.Conv2d, nn.Linear)):
            return True
        if id(current) not in seen:
            seen.add(id(current))
            stack.extend(current.outputs)
    return False


def _groups(graph: Any, model: nn.Module, keep: set[nn.Module], values: Values) -> list[ChannelGroup]:
    names = {module: name for name, module in model.named_modules()}
    found = []
    for group in graph.get_all_groups(ignored_layers=list(keep), root_module_types=[nn.Conv2d]):
        channels = len(group[0].idxs)
        rows = [row for item in group.items if (row := _energy(graph, item, channels, values)) is not None]
        convs = [item.dep for item in group.items if isinstance(item.dep.target.module, nn.Conv2d)]
        layers = tuple(names[c.target.module] for c in convs if graph.is_out_channel_pruning_fn(c.handler))
        blocks = max((_blocks(c.target.module) for c in convs), default=1)
        root = group[0].dep
        found.append(ChannelGroup(root.target.module, root.handler, layers, torch.stack(rows), blocks))
    return found


def _blocks(conv: nn.Conv2d) -> int:
    """Blocks of a grouped convolution; 1 for an ordinary and for a depthwise one."""
    return 1 if conv.groups == conv.in_channels == conv.out_channels else conv.groups


def _energy(graph: Any, item: Any, channels: int, values: Values) -> Tensor | None:
    """What a member says of each channel of the root, or None for one without a say."""
    module = item.dep.target.module
    produces = isinstance(module, nn.BatchNorm2d) or graph.is_out_channel_pruning_fn(item.dep.handler)
    per_index = values(module, produces)
    if per_index is None:
        return None
    energy = torch.zeros(channels, device=per_index.device)
    return energy.index_add_(0, torch.tensor(item.root_idxs, device=per_index.device), per_index[item.idxs])
