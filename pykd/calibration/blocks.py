"""Blocks: modules that calibration can run alone, again and again, on what the model gave them.

The children of nn.ModuleList and nn.Sequential are candidates. One pass over the examples, the survey, looks what each
is given: a tensor that an earlier block was given or returned needs no other part of the model to be had again, so the
examples go from block to block, and each runs once for every layer that is measured in it, whatever lies before it. A
candidate that the model calls twice, that is given something other than tensors and plain values, or that alone does
not compute bit for bit what it computes inside the model, is no block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What holds blocks as its children.
CONTAINERS: tuple[type[nn.Module], ...] = (nn.ModuleList, nn.Sequential)
#: What a block may be given beside tensors.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

#: The names of the blocks around something, from the outermost on; () is the model.
Path = tuple[str, ...]
#: Positional and named arguments of a call.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Slot(NamedTuple):
    """Where a tensor is first seen: the number ``leaf`` of what a block is given or of what it returns."""

    block: str
    returned: bool
    leaf: int


@dataclass
class Block:
    """One block: where it lies, and when it was first called. route: its arguments, a Slot in the place of each tensor;
    None when they differ from batch to batch. calls: how often it runs in each batch. writes: it changes its inputs."""

    name: str
    path: Path
    number: int
    calls: list[int]
    route: Any = None
    alone: bool = True
    writes: bool = False


@dataclass
class _Frame:
    """A block that is running: the tensors that it was given with their versions, and what it returned alone."""

    block: Block
    given: list[tuple[Tensor, int]]
    again: list[Any] | None


@dataclass
class Survey:
    """What one pass over the batches saw of layers and blocks.

    calls: layer -> how often it ran in each batch. shares: layer -> the layer before it that was given the same tensor.
    paths: layer -> the blocks around all of its calls. numbers: layer -> when it was first called.
    """

    batches: int
    blocks: dict[str, Block] = field(default_factory=dict)
    calls: dict[str, list[int]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    batch: int = 0
    _running: list[_Frame] = field(default_factory=list)
    _known: dict[tuple[Path, int, int], Slot] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)
    _testing: bool = False
    _last: tuple[str, Tensor, int] | None = None
    _count: int = 0

    def begin(self, batch: int) -> None:
        """The next batch; what was kept to tell the tensors of the last one apart is dropped."""
        self.batch, self._last = batch, None
        self._running, self._known, self._kept = [], {}, []

    def layer(self, name: str, x: Tensor, alike: Callable[[str, str], bool]) -> None:
        """A layer is called. alike(name, other): whether two layers may share statistics of one input."""
        if self._testing:
            return
        path = tuple(frame.block.name for frame in self._running)
        if name not in self.calls:
            self.calls[name], self.paths[name], self.numbers[name] = [0] * self.batches, path, self._number()
            last = self._last
            if last is not None and last[1] is x and last[2] == x._version and alike(name, last[0]):
                self.shares[name] = last[0]
        self.calls[name][self.batch] += 1
        for other in {*path} ^ {*self.paths[name]}:  # what also runs elsewhere cannot be finished with such a block
            self.blocks[other].alone = False
        self._last = name, x, x._version

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A candidate is called."""
        if self._testing:
            return
        path = tuple(frame.block.name for frame in self._running)
        new = name not in self.blocks
        if new:
            self.blocks[name] = Block(name, path, self._number(), [0] * self.batches)
        block, given = self.blocks[name], list(leaves((args, kwargs)))
        block.calls[self.batch] += 1
        plain = all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in given)
        block.alone &= plain and block.path == path and block.calls[self.batch] == 1
        route = rebuilt((args, kwargs), iter([self._slot(block, False, *pair) for pair in enumerate(given)]))
        block.route = route if new or block.route == route else None
        versions = [(leaf, leaf._version) for leaf in given if isinstance(leaf, Tensor)]
        self._running.append(
            _Frame(block, versions, self._alone(module, args, kwargs) if new and block.alone else None)
        )

    def leave(self, output: Any) -> None:
        """The candidate that was entered last returns."""
        if self._testing:
            return
        frame, found = self._running.pop(), returned(output)
        frame.block.writes |= any(tensor._version != version for tensor, version in frame.given)
        if frame.again is not None:
            frame.block.alone &= len(frame.again) == len(found) and all(map(_same, frame.again, found))
        for pair in enumerate(found):
            self._slot(frame.block, True, *pair)

    def end(self) -> None:
        """After the last batch: only blocks remain, and every path leads through blocks."""
        self.begin(0)
        self.paths = {name: self._usable(path) for name, path in self.paths.items()}
        within = {name: (*block.path, name) for name, block in self.blocks.items()}
        self.blocks = {name: block for name, block in self.blocks.items() if self._usable(within[name]) == within[name]}

    def _usable(self, path: Path) -> Path:
        ends = [index for index, name in enumerate(path) if not self.blocks[name].alone]
        return path[: ends[0]] if ends else path

    def _slot(self, block: Block, returned: bool, leaf: int, value: Any) -> Any:
        """The slot of a tensor, this one when it is new among the blocks of this path; plain values are themselves."""
        if not isinstance(value, Tensor):
            return value
        self._kept.append(value)  # or another tensor could have its id
        return self._known.setdefault((block.path, id(value), value._version), Slot(block.name, returned, leaf))

    def _alone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        self._testing = True
        try:
            args, kwargs = cloned((args, kwargs))
            return returned(module(*args, **kwargs))
        finally:
            self._testing = False

    def _number(self) -> int:
        self._count += 1
        return self._count


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that may be blocks, by name.

    >>> list(candidates(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    ['0', '1']
    """
    parents = [module for module in model.modules() if isinstance(module, CONTAINERS)]
    children = {child for parent in parents for child in parent.children()}
    return {name: module for name, module in model.named_modules() if module in children}


def leaves(value: Any) -> Iterator[Any]:
    """What tuples, lists and dicts hold, however deep; classes derived from them are leaves.

    >>> list(leaves(((1, [2]), {"a": 3})))
    [1, 2, 3]
    """
    if type(value) in (tuple, list, dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def returned(output: Any) -> list[Any]:
    """The leaves of what a module returned, also in the output classes of transformers."""
    return list(leaves(tuple(output.values()) if isinstance(output, dict) else output))


def rebuilt(value: Any, new: Iterator[Any]) -> Any:
    """The same tuples, lists and dicts with other leaves.

    >>> rebuilt((1, {"a": [2]}), iter("xy"))
    ('x', {'a': ['y']})
    """
    if type(value) in (tuple, list):
        return type(value)(rebuilt(part, new) for part in value)
    if type(value) is dict:
        return {key: rebuilt(part, new) for key, part in value.items()}
    return next(new)


def cloned(call: Call) -> Call:
    """The same call with tensors of its own."""
    return rebuilt(call, iter([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(call)]))  # type: ignore[no-any-return]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return isinstance(one, PLAIN) and bool(one == other)
