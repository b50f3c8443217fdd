"""The way through a surveyed model: block by block, and in each of them layer by layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from pykd.calibration.blocks import Block, Call, Path, Slot, Survey, cloned, leaves, rebuilt, returned

#: Runs one batch, by its number, through the model or through a block.
Run = Callable[[int], Any]
#: Slot -> its tensor in each batch; None where the batch does not come there.
Pool = dict[Slot, list[Tensor | None]]


class EnoughError(BaseException):
    """Ends a forward pass once all that it was made for is seen; not an Exception, so that no model catches it."""


class Walk:
    """measure(layers, run) is called for layers that share an input, in order of execution, behind those before.

    `run` computes no more than the innermost block around them. The arguments of one block for all batches are kept at
    a time, and of its outputs what later blocks will be given.
    """

    def __init__(self, model: nn.Module, survey: Survey, measure: Callable[[list[str], Run], None]) -> None:
        self.model, self.survey, self.measure = model, survey, measure
        self.parties = list(parties(survey))

    def through(self, path: Path, run: Run) -> None:
        """Measure all layers in the model, (), or in a block, with ``run`` to run it."""
        items, pool = self._items(path), Pool()
        for index, item in enumerate(items):
            if not isinstance(item, Block):
                self.measure(item, run)
                continue
            calls = self._calls(item, pool, run)
            if calls is None:
                continue
            wanted = {slot for later in items[index + 1 :] if isinstance(later, Block) for slot in slots(later)}
            self._keep_given(item, calls, wanted, pool)
            alone = functools.partial(self._run, item, calls)
            self.through((*path, item.name), alone)
            self._keep_returned(item, alone, wanted, pool)
            for slot in pool.keys() - wanted:
                del pool[slot]

    def _items(self, path: Path) -> list[Block | list[str]]:
        """Layers and blocks right inside, in order of execution, as far as there are layers."""
        items: list[tuple[int, Block | list[str]]] = [
            (self.survey.numbers[party[0]], party) for party in self.parties if self.survey.paths[party[0]] == path
        ]
        items += [(block.number, block) for block in self.survey.blocks.values() if block.path == path]
        ordered = [item for _, item in sorted(items, key=lambda item: item[0])]
        while ordered and isinstance(ordered[-1], Block) and not self._holds_layers(ordered[-1]):
            ordered.pop()
        return ordered

    def _holds_layers(self, block: Block) -> bool:
        return any(block.name in path for path in self.survey.paths.values())

    def _calls(self, block: Block, pool: Pool, run: Run) -> list[Call | None] | None:
        """The block's arguments in every batch; None where they would cost a run and no layer needs them."""
        if block.route is not None and all(slot in pool for slot in slots(block)):
            return [self._routed(block, pool, index) for index in range(self.survey.batches)]
        return self._captured(block, run) if self._holds_layers(block) else None

    def _routed(self, block: Block, pool: Pool, index: int) -> Call | None:
        if not block.calls[index]:
            return None
        found = [pool[leaf][index] if isinstance(leaf, Slot) else leaf for leaf in leaves(block.route)]
        return rebuilt(block.route, iter(found))  # type: ignore[no-any-return]

    def _captured(self, block: Block, run: Run) -> list[Call | None]:
        """Run what is around the block as far as the block."""
        calls: list[Call | None] = [None] * self.survey.batches
        for index in range(self.survey.batches):
            if not block.calls[index]:
                continue

            def take(args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                calls[index] = args, kwargs
                raise EnoughError

            with contextlib.suppress(EnoughError), hooked(self.model.get_submodule(block.name), take):
                run(index)
        return calls

    def _run(self, block: Block, calls: list[Call | None], index: int) -> Any:
        call = calls[index]
        if call is None:
            return None
        args, kwargs = cloned(call) if block.writes else call
        return self.model.get_submodule(block.name)(*args, **kwargs)

    def _keep_given(self, block: Block, calls: list[Call | None], wanted: set[Slot], pool: Pool) -> None:
        for place, slot in enumerate(leaves(block.route)):
            if isinstance(slot, Slot) and slot in wanted and slot not in pool:
                pool[slot] = [None if call is None else list(leaves(call))[place] for call in calls]

    def _keep_returned(self, block: Block, run: Run, wanted: set[Slot], pool: Pool) -> None:
        mine = [slot for slot in wanted if slot.block == block.name and slot.returned]
        if mine:
            pool.update({slot: [None] * self.survey.batches for slot in mine})
            for index in (index for index, count in enumerate(block.calls) if count):
                found = returned(run(index))
                for slot in mine:
                    pool[slot][index] = found[slot.leaf]


def slots(block: Block) -> list[Slot]:
    """The tensors that a block is given."""
    return [leaf for leaf in leaves(block.route) if isinstance(leaf, Slot)]


def parties(survey: Survey) -> Iterator[list[str]]:
    """Layers that are given the same tensor one after the other, inside the same blocks."""
    party: list[str] = []
    for name, counts in survey.calls.items():
        alike = bool(party) and counts == survey.calls[party[0]] and survey.paths[name] == survey.paths[party[0]]
        if alike and survey.shares.get(name) == party[-1]:
            party.append(name)
            continue
        if party:
            yield party
        party = [name]
    if party:
        yield party


@contextlib.contextmanager
def hooked(module: nn.Module, take: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Give ``take`` the arguments of every call of the module."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: take(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
