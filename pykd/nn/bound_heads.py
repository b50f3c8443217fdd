"""Attention heads that are bound to each other: all blocks of a stack share one position bias per head (T5, MPNet)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from pykd.nn.slicing import HEAD_SIZE, AttentionBlock, linears_at

#: Relative names of query, key, value and output projection, and of the bias [buckets, heads] that some blocks hold, or
#: that the stack around them holds for all (MPNet).
BOUND: dict[str, tuple[str, str, str, str, str]] = {"t5, mpnet": ("q", "k", "v", "o", "relative_attention_bias")}


def bound_blocks(model: nn.Module) -> list[AttentionBlock]:
    """Every attention block whose heads can only be removed together with those of the others of its `tie`.

    A tie are the self-attentions, or the cross-attentions, of one stack: the bias that the first of them makes is added
    in all. Blocks that hold anything else are left out.
    """
    found: list[AttentionBlock] = []
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        for *names, bias_name in BOUND.values():
            linears = linears_at(module, names)
            size = next(
                (getattr(module, attribute, None) for attribute in HEAD_SIZE if hasattr(module, attribute)), None
            )
            if linears is None or not isinstance(size, int) or not _nothing_else(module, (*names, bias_name)):
                continue
            bias = getattr(module, bias_name, None) or _around(model, name, bias_name)
            if bias in taken:  # one block cuts it, for all
                bias = None
            elif bias is not None:
                taken.add(bias)
            tie = re.sub(r"\.\d+(?=\.)", "", name)
            query, key, value, output = linears
            found.append(AttentionBlock(name, query, key, value, output, size, (module,), bias, tie))
    return found


def ties(blocks: Sequence[AttentionBlock]) -> list[list[AttentionBlock]]:
    """The blocks in groups that keep the same heads; a block without a tie is a group of its own."""
    groups: dict[str, list[AttentionBlock]] = {}
    for block in blocks:
        groups.setdefault(block.tie or block.name, []).append(block)
    return list(groups.values())


def _around(model: nn.Module, name: str, bias_name: str) -> nn.Embedding | None:
    """The bias that a module around the block holds."""
    while name:
        name = name.rpartition(".")[0]
        bias = getattr(model.get_submodule(name), bias_name, None)
        if isinstance(bias, nn.Embedding):
            return bias
    return None


def _nothing_else(module: nn.Module, names: Sequence[str]) -> bool:
    others = [name for name, child in module.named_modules() if name not in ("", *names) and list(child.parameters())]
    return not others and not list(module.parameters(recurse=False))
