"""Data sets by their `datasets` name: the Hugging Face hub, its local cache, or a folder of data files."""

from __future__ import annotations

from typing import Any

from pykd.data.tables import Table
from pykd.errors import DataError, nearest


def load_splits(name: str, *, subset: str | None, label_column: str) -> tuple[Table, Table | None, list[str] | None]:
    """(train, test or None, class names or None) of ``datasets.load_dataset(name, subset)``.

    The held-out split is `test` if it has labels, else `validation`; names come from a ClassLabel column. Raises
    DataError when the data set cannot be had, with the reason, and when it has no `train` split.
    """
    found = _load(name, subset)
    if "train" not in found:
        raise DataError(f"{name!r}: {nearest('split', 'train', found)}")
    tables = {
        split: _table(found[split], f"{name} ({split})") for split in found if split in ("train", "test", "validation")
    }
    feature = found["train"].features.get(label_column)
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of a ClassLabel, or of a list of them
    held_out = next(
        (tables[s] for s in ("test", "validation") if s in tables and _labelled(tables[s], label_column)), None
    )
    return tables["train"], held_out, list(names) if names else None


def load_all(name: str, *, subset: str | None) -> dict[str, Table]:
    """Every split of ``datasets.load_dataset(name, subset)`` by its name; DataError, with the reason, without any."""
    found = _load(name, subset)
    return {split: _table(found[split], f"{name} ({split})") for split in found}


def _load(name: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name!r} needs the datasets library: `pip install 'pykd[huggingface]'`, or a local file"
        ) from None
    try:
        return datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises two dozen types, from missing network to a missing configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"cannot load the data set {name!r}{f' ({subset})' if subset else ''}: {reason}; "
            "give the path of a local .csv, .jsonl or .parquet file instead"
        ) from error


def _table(split: Any, source: str) -> Table:
    return Table(source, {name: list(split[name]) for name in split.column_names}, lambda row: f"row {row + 1}")


def _labelled(table: Table, label_column: str) -> bool:
    return any(label not in (-1, None) for label in table.columns.get(label_column, []))
