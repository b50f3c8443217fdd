"""What every loader of texts begins with: the tables of both splits, checked columns of text, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pykd.data.hub import load_splits
from pykd.data.tables import Table, is_local, read_table
from pykd.errors import DataError


def tables(
    source: str, test_source: str | Path | None, split_column: str | None, subset: str | None, label_column: str
) -> tuple[Table, Table | None, list[str] | None]:
    """(train, test or None, class names or None) of a local file or of a `datasets` name.

    The test table is, in this order, the file ``test_source``, the rows whose ``split_column`` says `test`, or the
    held-out split of a data set.
    """
    if not is_local(source):
        train, test, names = load_splits(source, subset=subset, label_column=label_column)
        return train, test if test_source is None else read_table(test_source), names
    table = read_table(source)
    if test_source is not None:
        return table, read_table(test_source), None
    if split_column is not None:
        return *_split(table, split_column), None
    return table, None, None


def _split(table: Table, split_column: str) -> tuple[Table, Table]:
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for row, split in enumerate(table.column(split_column)):
        if split not in rows:
            raise DataError(
                f"{table.source}, {table.place(row)}: column {split_column!r} must say 'train' or 'test', got {split!r}"
            )
        rows[split].append(row)
    for split, found in rows.items():
        if not found:
            raise DataError(f"{table.source}: no row of column {split_column!r} says {split!r}; both splits need rows")
    return table.take(rows["train"]), table.take(rows["test"])


def texts(table: Table, text_column: str) -> list[str]:
    """A column that holds text in every row; DataError that names the first row which does not."""
    column = table.column(text_column)
    for row, text in enumerate(column):
        if not isinstance(text, str):
            raise DataError(
                f"{table.source}, {table.place(row)}: column {text_column!r} must hold text, got {text!r} "
                f"({type(text).__name__}); name the right column or delete the row"
            )
        if not text.strip():
            raise DataError(f"{table.source}, {table.place(row)}: column {text_column!r} is empty; delete the row")
    return column


def preprocessing(source: str | Path, tokenizer: Any, **numbers: Any) -> dict[str, Any]:
    """What was done to the texts, for a saved model's record: source, tokenizer, and the loader's numbers.

    >>> preprocessing("a.csv", object(), seed=0)
    {'source': 'a.csv', 'tokenizer': 'object', 'seed': 0}
    """
    name = str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__))
    return {"source": str(source), "tokenizer": name, **numbers}


def load_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer as it is, or by its name or folder. Raises DataError, with the reason, when it cannot be loaded."""
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except Exception as error:  # transformers raises OSError, ValueError, and errors of the hub and of JSON
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot load the tokenizer {str(tokenizer)!r}: {reason}; give the folder of a saved tokenizer"
        ) from error
