"""What the zeros of pruned layers are still worth once the layers are packed, said in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pykd.nn.sparse_linear import SparseWeight

#: Buffers of layers whose kernels pass over zeros on this machine.
SKIPPING = {"kept", "panels"}
#: What each layer's facts say of its zeros.
BOTH, BYTES, TIME, NOTHING = "save bytes and time", "save bytes", "save time", "save nothing"


def worth(packed: Any) -> str:
    """What the zeros of a pruned layer save when it is packed.

    They save bytes where the file holds the kept weights alone, and time where the kernel that multiplies on this
    machine passes over them; else it takes as long as if nothing had been pruned.
    """
    smaller, faster = packed.nnz is not None, bool(SKIPPING & packed._buffers.keys())
    return {(True, True): BOTH, (True, False): BYTES, (False, True): TIME}.get((smaller, faster), NOTHING)


def sentences(model: nn.Module, changed: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, str]) -> list[str]:
    """What a user who prunes and quantizes should know; nothing for a model without pruned layers.

    changed: layer -> its facts, with ``zeros``, what `worth` says, where it was pruned. skipped: layer -> why not.

    >>> sentences(nn.Identity(), {"a": {"zeros": BYTES}, "b": {"zeros": BOTH}, "c": {}}, {})
    ['zeros save no time in 1 of 2 pruned layers: packed, they take as long as if nothing had been pruned there']
    """
    zeros = [facts["zeros"] for facts in changed.values() if "zeros" in facts]
    slower, larger = sum(each in (BYTES, NOTHING) for each in zeros), sum(each in (TIME, NOTHING) for each in zeros)
    sparse = {name for name, module in model.named_modules() if isinstance(module, SparseWeight)}
    left = [name for name, reason in skipped.items() if name in sparse and reason.endswith("no gain")]
    said = []
    if slower:
        said.append(
            f"zeros save no time in {slower} of {len(zeros)} pruned layers: packed, they take as long as if nothing "
            "had been pruned there"
        )
    if larger:
        said.append(
            f"zeros save no bytes in {larger} of {len(zeros)} pruned layers: packed, they are stored like all others"
        )
    if left:
        said.append(f"{len(left)} pruned layers stay sparse: packed, each would be hardly smaller, or larger")
    return said
