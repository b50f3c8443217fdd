"""Physical removal of units: attention heads and feed-forward neurons of transformers, rows and columns of layers.

A unit is removed by keeping the slices of every weight that produces or consumes it; the layers stay the objects they
were, with smaller parameters. Blocks are found by the relative names of their projections (`ATTENTION`,
`FEED_FORWARD`): a new family is one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Relative names of query, key, value and output projection inside one attention block.
ATTENTION: dict[str, tuple[str, str, str, str]] = {
    "bert, roberta, electra, camembert": ("self.query", "self.key", "self.value", "output.dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "llama, mistral, qwen, gemma, vit": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "bart, opt, clip, whisper": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "vit of transformers 4, deit": ("attention.query", "attention.key", "attention.value", "output.dense"),
    "gpt2": ("c_attn", "c_attn", "c_attn", "c_proj"),
}
#: Relative names of the projections into and out of the neurons of one feed-forward block.
FEED_FORWARD: dict[str, tuple[tuple[str, ...], str]] = {
    "bert, roberta, electra, deit": (("intermediate.dense",), "output.dense"),
    "distilbert": (("lin1",), "lin2"),
    "vit, clip, bart, opt, whisper": (("fc1",), "fc2"),
    "llama, mistral, qwen, gemma": (("gate_proj", "up_proj"), "down_proj"),
    "t5": (("wi",), "wo"),
    "t5 gated": (("wi_0", "wi_1"), "wo"),
    "gpt2": (("c_fc",), "c_proj"),
}
#: Attributes that hold the width of one head, the number of query heads, of key heads, and heads times width.
HEAD_SIZE = ("attention_head_size", "head_dim", "key_value_proj_dim")
QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads",)
ALL_HEADS = ("all_head_size", "split_size", "inner_dim")


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block. Units are its key/value heads, each with the query heads that share it."""

    name: str
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    head_size: int
    holders: tuple[nn.Module, ...]  # modules that may carry head counts as attributes
    bias: nn.Embedding | None = None  # a position bias with one column per head
    tie: str = ""  # blocks of one tie keep the same heads

    @property
    def fused(self) -> bool:
        """Whether one layer makes query, key and value, one after the other."""
        return self.query is self.value

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """The layers that make query, key and value."""
        return (self.query,) if self.fused else (self.query, self.key, self.value)

    @property
    def units(self) -> int:
        """Key/value heads."""
        return self.key.out_features // self.head_size // (3 if self.fused else 1)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.out_features // self.head_size // (3 if self.fused else 1)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block; units are its hidden neurons."""

    name: str
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear

    @property
    def units(self) -> int:
        """Hidden neurons."""
        return self.output.in_features


def attention_blocks(model: nn.Module) -> list[AttentionBlock]:
    """Every attention block whose heads can be removed, in module order.

    Blocks with other parameters that depend on heads (relative position biases, norms over all heads) are left out.
    """
    found: list[AttentionBlock] = []
    for name, module in model.named_modules():
        for names in ATTENTION.values():
            linears = linears_at(module, names)
            if linears is None:
                continue
            query, key, value, output = linears
            holders = (module, module.get_submodule(names[0].rpartition(".")[0]))
            size = _first_attribute(holders, HEAD_SIZE)
            width = query.out_features // (3 if query is value else 1)
            shapes_fit = size and width == output.in_features and key.out_features == value.out_features
            if size and shapes_fit and not key.out_features % size and _only_per_head(module, linears, size):
                found.append(AttentionBlock(name, query, key, value, output, size, holders))
                break
    return found


def feed_forward_blocks(model: nn.Module) -> list[FeedForward]:
    """Every feed-forward block whose neurons can be removed, in module order."""
    found: list[FeedForward] = []
    for name, module in model.named_modules():
        for inputs, output in FEED_FORWARD.values():
            linears = linears_at(module, (*inputs, output))
            if linears is not None and all(layer.out_features == linears[-1].in_features for layer in linears[:-1]):
                found.append(FeedForward(name, tuple(linears[:-1]), linears[-1]))
                break
    return found


@torch.no_grad()
def keep_heads(block: AttentionBlock, kept: Sequence[int]) -> None:
    """Keep only these key/value heads (with their query heads) of a block, and correct its attributes."""
    size, per_unit = block.head_size, block.heads // block.units
    key_rows = _expand(kept, size)
    query_rows = _expand(kept, size * per_unit)
    if block.fused:
        width = block.output.in_features
        keep_rows(block.query, torch.cat([query_rows + part * width for part in range(3)]))
    else:
        keep_rows(block.query, query_rows)
        keep_rows(block.key, key_rows)
        keep_rows(block.value, key_rows)
    keep_columns(block.output, query_rows)
    if block.bias is not None:
        block.bias.weight = _sliced(block.bias.weight, 1, _expand(kept, per_unit))
        block.bias.embedding_dim = block.heads
    for holder in block.holders:
        _set_existing(holder, QUERY_HEADS, block.heads)
        _set_existing(holder, KEY_HEADS, block.units)
        _set_existing(holder, ALL_HEADS, block.heads * size)


@torch.no_grad()
def keep_neurons(block: FeedForward, kept: Sequence[int]) -> None:
    """Keep only these neurons of a feed-forward block."""
    for layer in block.inputs:
        keep_rows(layer, torch.as_tensor(kept))
    keep_columns(block.output, torch.as_tensor(kept))


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Keep these output features of a layer, in this order."""
    linear.weight = _sliced(linear.weight, 0, kept)
    if linear.bias is not None:
        linear.bias = _sliced(linear.bias, 0, kept)
    linear.out_features = len(kept)


def keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    """Keep these input features of a layer, in this order."""
    linear.weight = _sliced(linear.weight, 1, kept)
    linear.in_features = len(kept)


def head_scores(block: AttentionBlock, *, norm: int = 2) -> Tensor:
    """L1 or L2 norm of all weights that go with each key/value head; float32 [units]."""
    parts = 3 if block.fused else 1
    produced = torch.stack([_produced(layer, block.units, norm, parts) for layer in block.projections]).sum(0)
    return _rooted(produced + _consumed(block.output, block.units, norm), norm)


def neuron_scores(block: FeedForward, *, norm: int = 2) -> Tensor:
    """L1 or L2 norm of all weights that go with each neuron; float32 [units]."""
    produced = torch.stack([_produced(layer, block.units, norm) for layer in block.inputs]).sum(0)
    return _rooted(produced + _consumed(block.output, block.units, norm), norm)


def kept_count(units: int, sparsity: float) -> int:
    """Units left when the share ``sparsity`` (0..1) is removed: at least one."""
    return max(1, units - round(units * sparsity))


def strongest(scores: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index.

    >>> strongest(torch.tensor([1.0, 5.0, 3.0, 5.0]), 2)
    [1, 3]
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def _produced(layer: nn.Linear, units: int, norm: int, parts: int = 1) -> Tensor:
    """Sum over the rows of each unit of |w|^norm; a fused layer has them once in each of its parts."""
    rows = layer.weight.detach().float().abs().pow(norm).sum(1)
    return rows.view(parts, units, -1).sum((0, 2))


def _consumed(layer: nn.Linear, units: int, norm: int) -> Tensor:
    return layer.weight.detach().float().abs().pow(norm).sum(0).view(units, -1).sum(1)


def _rooted(sums: Tensor, norm: int) -> Tensor:
    return sums.sqrt() if norm == 2 else sums


def _sliced(parameter: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, kept.to(parameter.device)).clone()
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _expand(units: Sequence[int], width: int) -> Tensor:
    """Feature indices of units that are ``width`` consecutive features each."""
    return (torch.as_tensor(units)[:, None] * width + torch.arange(width)).flatten()


def linears_at(module: nn.Module, names: Sequence[str]) -> list[nn.Linear] | None:
    """The linear layers at these relative names, or None where one of them is missing or something else."""
    found: list[nn.Linear] = []
    for name in names:
        try:
            child = module.get_submodule(name)
        except AttributeError:
            return None
        if not isinstance(child, nn.Linear):
            return None
        found.append(child)
    return found


def _first_attribute(holders: Sequence[nn.Module], names: Sequence[str]) -> int | None:
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _set_existing(module: nn.Module, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _only_per_head(module: nn.Module, linears: Sequence[nn.Linear], head_size: int) -> bool:
    """True when nothing but the projections depends on the number of heads."""
    mine = set(map(id, linears))
    return all(_head_free(child, owner, head_size) for child, owner in _others(module, mine))


def _others(module: nn.Module, mine: set[int]) -> Iterator[tuple[nn.Module, str]]:
    for name, child in module.named_modules():
        if id(child) not in mine and any(True for _ in child.parameters(recurse=False)):
            yield child, name.rpartition(".")[2]


def _head_free(child: nn.Module, name: str, head_size: int) -> bool:
    if "Norm" not in type(child).__name__:
        return False
    over_heads = name in ("q_norm", "k_norm", "query_norm", "key_norm")
    return not over_heads or all(p.numel() == head_size for p in child.parameters(recurse=False))
