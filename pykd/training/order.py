"""Which rows make a step, and which of them are one forward pass of one process: functions of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Sequence

from pykd.data.bundle import MapDataset, permutation
from pykd.errors import DataError

#: Steps within which rows are sorted by length: enough to be alike, few enough to leave the order random.
BLOCK_STEPS = 50


def epoch_order(size: int, *, seed: int, epoch: int, step_rows: int, lengths: Sequence[int] | None) -> list[int]:
    """Rows of one epoch in the order in which steps take them, ``step_rows`` at a time; the last step may be smaller.

    With lengths, rows are sorted inside blocks of ``BLOCK_STEPS`` steps, and the steps then come in random order.

    >>> epoch_order(5, seed=0, epoch=0, step_rows=2, lengths=[9, 1, 8, 2, 5])
    [4, 1, 0, 2, 3]
    """
    order = permutation(size, seed=seed, epoch=epoch)
    if lengths is None:
        return order
    block = BLOCK_STEPS * step_rows
    whole = size - size % step_rows
    rows = [
        row
        for first in range(0, whole, block)
        for row in sorted(order[first : min(first + block, whole)], key=lambda row: -lengths[row])
    ]
    steps = permutation(whole // step_rows, seed=seed, epoch=epoch)
    return [row for step in steps for row in rows[step * step_rows : (step + 1) * step_rows]] + order[whole:]


def share(rows: Sequence[int], parts: int, part: int) -> Sequence[int]:
    """One of ``parts`` almost equal, consecutive pieces of a step's rows; empty when there are fewer rows than parts.

    >>> [list(share([1, 2, 3, 4, 5], 2, part)) for part in range(2)]
    [[1, 2, 3], [4, 5]]
    """
    each, more = divmod(len(rows), parts)
    first = part * each + min(part, more)
    return rows[first : first + each + (part < more)]


#: What tells the length of an example, the first that it has: tokens, words, or the characters of a text.
LENGTH_KEYS = ("input_ids", "tokens", "words", "target", "text")


def row_lengths(dataset: MapDataset) -> list[int]:
    """The length of every row, in the unit of the first of ``LENGTH_KEYS`` that it has; DataError for data with none.

    >>> row_lengths([{"text": "one"}, {"text": "longer"}])
    [3, 6]
    """
    first = dataset[0]
    key = next((key for key in LENGTH_KEYS if key in first), None)
    if key is None:
        raise DataError(
            f"group_by_length needs examples with one of {', '.join(LENGTH_KEYS)}, but they have "
            f"{', '.join(map(str, first))}: leave it out"
        )
    return [len(dataset[index][key]) for index in range(len(dataset))]
