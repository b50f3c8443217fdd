"""Local files and `datasets` names as plain columns. What is wrong with a file is said with its name and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykd.errors import DataError, nearest


@dataclass(frozen=True)
class Table:
    """Columns of equal length, where they came from, and for each row the place to look at (a line or row number)."""

    source: str
    columns: dict[str, list[Any]]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[Any]:
        """One column by name; DataError with the nearest name when there is none."""
        if name not in self.columns:
            raise DataError(f"{self.source}: {nearest('column', name, self.columns)}")
        return self.columns[name]

    def take(self, rows: list[int]) -> Table:
        """The table of these rows; their places stay those of the original."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.source, columns, lambda row: self.place(rows[row]))


def is_local(source: str | Path) -> bool:
    """Whether a source names a file (it exists, or it ends like one) rather than a `datasets` name or folder."""
    path = Path(source)
    return path.is_file() or path.suffix.lower() in READERS


def read_table(source: str | Path) -> Table:
    """Read a .csv, .tsv, .jsonl, .json (one object a line), .parquet or .yaml (a list of mappings) file, UTF-8.

    Raises DataError for a file that is not there, is empty, has another ending, or holds a line that cannot be read.
    """
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot tell the format from the ending {path.suffix!r}; use {', '.join(sorted(READERS))}"
        )
    if not path.is_file():
        known = sorted(entry.name for entry in path.parent.glob("*") if entry.suffix.lower() in READERS)
        raise DataError(
            f"{path} does not exist" + (f": {nearest('file', path.name, known)}" if known else "; check the path")
        )
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8") from None
    if len(table) == 0:
        raise DataError(f"{path} holds no rows; give it at least two labelled texts")
    return table


def _read_delimited(path: Path, delimiter: str) -> Table:
    rows, lines = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} column names; quote "
                        f"cells that contain {delimiter!r} or a line break"
                    )
                rows.append(cells)
                lines.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}); check the quotes") from None
    columns = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    return Table(str(path), columns, lambda row: f"line {lines[row]}")


def _read_json_lines(path: Path) -> Table:
    rows, lines = [], []
    for number, record in _records(path):
        rows.append(record)
        lines.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table(str(path), columns, lambda row: f"line {lines[row]}")


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                    "the file must hold one JSON object per line"
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, got {type(record).__name__}; write {{...}}"
                )
            yield number, record


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; `pip install 'pykd[huggingface]'` brings it") from None
    try:
        columns = parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None
    return Table(str(path), columns, lambda row: f"row {row + 1}")


def _read_yaml(path: Path) -> Table:
    try:
        import yaml
    except ImportError:
        raise DataError(f"{path}: reading YAML needs pyyaml; `pip install 'pykd[recipes]'` brings it") from None
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of mappings, as `- text: ...`, got {type(rows).__name__}")
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, lambda row: f"entry {row + 1}")


#: File ending -> reader.
READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
