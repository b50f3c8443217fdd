"""Prompts that a safety classifier must tell apart: harmful ones, and harmless ones that only look so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykd.data.hub import load_all
from pykd.data.sources import texts
from pykd.data.tables import Table, is_local, read_table
from pykd.errors import DataError, nearest


@dataclass(frozen=True)
class Preset:
    """How a published benchmark is laid out: the column of texts, and which of them are harmful.

    label: a column whose values in ``harmful`` mark harmful prompts, "split" for the name of the split, or None where
    all are as ``always`` says. group: a column that results are also given by.
    """

    text: str
    label: str | None = None
    harmful: tuple[str, ...] = ()
    always: bool | None = None
    group: str | None = None


#: Benchmark -> its layout. Users bring the files, or the `datasets` name that their account may read.
PRESETS: dict[str, Preset] = {
    # Lakera's Prompt Injection Test: a YAML list of text, category, label (true: an injection or jailbreak).
    "pint": Preset("text", label="label", harmful=("true", "1"), group="category"),
    # Chao et al. 2024, subset "behaviors": goals in the splits harmful and benign.
    "jailbreakbench": Preset("Goal", label="split", harmful=("harmful",), group="Category"),
    # Li and Liu 2024: harmless prompts with the words of attacks, in splits of one, two and three such words.
    "notinject": Preset("prompt", always=False, group="category"),
}


@dataclass(frozen=True)
class Prompts:
    """A benchmark: texts, whether each is harmful, and the group it belongs to ("" where there are none)."""

    name: str
    texts: tuple[str, ...]
    harmful: tuple[bool, ...]
    groups: tuple[str, ...]


def load_prompts(
    source: str | Path,
    *,
    preset: str | None = None,
    name: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    harmful: Sequence[str] | None = None,
    always: bool | None = None,
    group_column: str | None = None,
    subset: str | None = None,
) -> Prompts:
    """Read a benchmark from a local file (.csv, .tsv, .jsonl, .json, .parquet, .yaml) or by its `datasets` name.

    preset: a layout of PRESETS, of which the other arguments change single entries: text_column, label_column (or
    "split"), harmful: the values of it that mark harmful prompts, compared as lower-case text; always: whether all
    prompts are harmful, instead of a label. group_column: for results by group. name: in reports, else the preset's or
    the file's. subset: of a `datasets` name, all of whose splits are read.

    Raises DataError for unknown presets and columns, for texts that are missing, when nothing says which prompts are
    harmful, and when a label marks none or is named and never occurs.

    >>> load_prompts("attacks.csv", always=True, text_column="prompt").harmful  # doctest: +SKIP
    (True, True)
    """
    layout = Preset("text")
    if preset is not None:
        if preset.lower() not in PRESETS:
            raise DataError(nearest("preset", preset, PRESETS))
        layout = PRESETS[preset.lower()]
    label = label_column or layout.label
    marks = tuple(harmful) if harmful is not None else layout.harmful
    always = always if always is not None else layout.always if label_column is None else None
    group = group_column or layout.group
    parts = [(read_table(source), "")] if is_local(source) else _splits(str(source), subset)
    found: list[tuple[str, bool, str]] = []
    for table, split in parts:
        column = texts(table, text_column or layout.text)
        flags = _flags(table, split, label, marks, always)
        groups = [str(each) for each in table.columns.get(group or "", [split] * len(table))]
        found += zip(column, flags, groups, strict=True)
    words, flagged, grouped = zip(*found, strict=True)
    if always is None and not any(flagged):
        raise DataError(
            f"{source}: no prompt is marked harmful; column {label!r} never says {' or '.join(marks)}: name the values "
            "by harmful=, or say always=False for harmless prompts only"
        )
    return Prompts(name or preset or Path(source).stem, words, flagged, grouped)


def _splits(name: str, subset: str | None) -> list[tuple[Table, str]]:
    return [(table, split) for split, table in load_all(name, subset=subset).items()]


def _flags(table: Table, split: str, label: str | None, marks: Sequence[str], always: bool | None) -> list[bool]:
    if always is not None:
        return [always] * len(table)
    if label == "split" and "split" not in table.columns and split:
        return [split.lower() in marks] * len(table)
    if label is None or (label == "split" and "split" not in table.columns):
        raise DataError(
            f"{table.source}: nothing says which prompts are harmful; name label_column= and harmful=, or say always="
        )
    wanted = {str(mark).lower() for mark in marks}
    values: list[Any] = table.column(label)
    return [str(value).lower() in wanted for value in values]
