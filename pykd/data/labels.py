"""Labels of a table as class numbers: strings and whole numbers become sorted class names, all else is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pykd.data.tables import Table
from pykd.errors import DataError, nearest


def class_names(table: Table, label_column: str) -> list[str]:
    """Sorted names of the labels that occur in a column: whole numbers by value, strings by alphabet.

    Raises DataError for a label that is missing, neither string nor whole number, or negative; for strings and numbers
    in one column; and for a column with a single class.
    """
    labels = _read(table, label_column)
    names = sorted({label for label in labels if isinstance(label, str)}) or [
        str(number) for number in sorted({label for label in labels if isinstance(label, int)})
    ]
    if len(names) < 2:
        raise DataError(
            f"{table.source}: column {label_column!r} holds the single label {names[0]!r}; a classifier needs two"
        )
    return names


def encode(table: Table, label_column: str, names: Sequence[str], *, numbered: bool = False) -> list[int]:
    """Class number of every row. numbered: whole-number labels are themselves class numbers 0..classes-1.

    Raises DataError for a label that no class name stands for.
    """
    index = {name: number for number, name in enumerate(names)}
    encoded = []
    for row, label in enumerate(_read(table, label_column)):
        if numbered and isinstance(label, int):
            if label >= len(names):
                raise DataError(
                    f"{table.source}, {table.place(row)}: label {label} is out of range, there are {len(names)} "
                    f"classes (0..{len(names) - 1}); correct column {label_column!r} or class_names"
                )
            encoded.append(label)
        elif str(label) in index:
            encoded.append(index[str(label)])
        else:
            raise DataError(f"{table.source}, {table.place(row)}: {nearest('label', str(label), index)}")
    return encoded


def _read(table: Table, label_column: str) -> list[str | int]:
    """The column as strings, or as whole numbers where every entry is one (a CSV file holds strings only)."""
    labels: list[str | int] = []
    first: dict[type, int] = {}
    for row, label in enumerate(table.column(label_column)):
        where = f"{table.source}, {table.place(row)}"
        label = str(label) if isinstance(label, bool) else label
        if label is None or label == "":
            raise DataError(f"{where}: column {label_column!r} is empty; label the row or delete it")
        if not isinstance(label, (str, int)):
            raise DataError(
                f"{where}: label {label!r} is a {type(label).__name__}; labels must be strings or whole numbers"
            )
        labels.append(label)
        first.setdefault(str if isinstance(label, str) else int, row)
    if len(first) > 1:
        raise DataError(
            f"{table.source}: column {label_column!r} mixes strings ({labels[first[str]]!r}, {table.place(first[str])})"
            f" and numbers ({labels[first[int]]!r}, {table.place(first[int])}); write all labels in one way"
        )
    return _whole_numbers(table, label_column, labels)


def _whole_numbers(table: Table, label_column: str, labels: list[str | int]) -> list[str | int]:
    try:
        numbers: list[Any] = [int(label) for label in labels]
    except ValueError:
        return labels
    for row, number in enumerate(numbers):
        if number < 0:
            raise DataError(
                f"{table.source}, {table.place(row)}: label {number} is out of range; class numbers start at 0, and "
                "rows without a label must be deleted"
            )
    return numbers
