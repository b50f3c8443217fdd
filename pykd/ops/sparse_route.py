"""Which CPU implementation of `sparse_linear` serves a weight: what was measured on this machine, else thresholds.

- expand: the values spread to their columns on the way, one stream over the weight; up to EXPAND_ROWS rows.
- panels: activations transposed, one multiply-add of many rows for each kept weight.
- dense: the dense weight kept in memory beside the packed one, torch multiplies.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from .dispatch import TABLE, Route, native, num_threads, vector_level

#: The most rows that the expanding kernel takes.
EXPAND_ROWS = 4
#: Multiply-adds of a dense call below which it is over before a sparse kernel has begun.
SMALL = 1 << 19
#: Level -> [(most rows, density above which dense, density above which expand)]: the first line with enough rows
#: counts, and below its densities the panels. AVX2's were measured on a Zen 3, AVX-512's on a Zen 5, where with 85 %
#: kept torch's dense multiplication still takes 1.7 to 2.3 times as long (1.9 at one row).
THRESHOLDS: dict[str, list[tuple[float, float, float]]] = {
    "scalar": [(1, 0.65, 0.4), (math.inf, 0.65, 1.0)],
    "avx2": [(1, 0.8, 0.4), (2, 0.9, 0.35), (4, 0.9, 0.5), (32, 0.9, 1.0), (math.inf, 0.7, 1.0)],
    "avx512": [(2, 0.85, 0.13), (4, 0.85, 0.25), (math.inf, 0.85, 1.0)],
}
#: Level -> density above which a weight whose rows keep the same columns in fours is faster dense, for more rows of x
#: than EXPAND_ROWS. AVX2's was measured on a Zen 3, AVX-512's follows from the share of its peak that dense reaches.
QUADS_DENSE = {"scalar": 0.65, "avx2": 0.95, "avx512": 0.85}
#: Densities in the same 1 / DENSITY_STEPS are taken for alike.
DENSITY_STEPS = 50


class Case(NamedTuple):
    """What a measurement holds for."""

    level: str
    threads: int
    dtype: str
    out_features: int
    in_features: int
    density_step: int


def case_of(density: float, out_features: int, in_features: int, dtype: str, quads: bool = False) -> Case:
    """The case of a weight in this process: its instruction-set level and number of threads belong to it."""
    step, kind = round(density * DENSITY_STEPS), f"{dtype} in quads" if quads else dtype
    return Case(native.isa(), num_threads(), kind, out_features, in_features, step)


#: Rows of x -> route -> microseconds of a call.
Times = dict[int, dict[str, float]]

#: Filled by `remember` and, once per process, from the file of earlier ones.
_measured: dict[Case, Times] = {}
_read: list[Path] = []


def route(
    density: float, rows: int, out_features: int, in_features: int, dtype: str = "float32", *, quads: bool = False
) -> str:
    """The route of a call: the measured one whose number of rows is nearest, by ratio, or the thresholds' one.

    dtype: element type of the values; quads: whether rows keep the same columns in fours (blocks of 4 x 1 and larger).
    Without the native module the answer is "reference".

    >>> from pykd.ops.dispatch import native
    >>> native is None or by_thresholds(0.95, 128) == "dense"
    True
    """
    if native is None:
        return "reference"
    if not _read:
        _read_file()
    if _measured:
        times = _measured.get(case_of(density, out_features, in_features, dtype, quads))
        if times:
            near = times[min(times, key=lambda measured: abs(math.log(measured / max(rows, 1))))]
            return min(candidates(rows), key=lambda name: near.get(name, math.inf))
    return "dense" if rows * out_features * in_features < SMALL else by_thresholds(density, rows, quads=quads)


def by_thresholds(density: float, rows: int, *, quads: bool = False) -> str:
    """The route of a large enough weight that was not measured."""
    if quads and rows > EXPAND_ROWS:
        return "dense" if density > QUADS_DENSE[vector_level()] else "panels"
    for most_rows, dense, expand in THRESHOLDS[vector_level()]:
        if rows <= most_rows:
            return "dense" if density > dense else "expand" if density > expand else "panels"
    raise AssertionError("the last line has no limit")


def candidates(rows: int) -> list[str]:
    """The routes that can serve so many rows."""
    return ["dense", "expand", "panels"] if rows <= EXPAND_ROWS else ["dense", "panels"]


def remember(case: Case, times: Times) -> None:
    """Choose by these times from now on, in this process and in later ones on this machine (best effort)."""
    if not _read:
        _read_file()
    _measured[case] = {**_measured.get(case, {}), **times}
    _write_file()


def remembered(case: Case) -> Times:
    """What was measured of a case, now or earlier on this machine; empty when nothing was."""
    if not _read:
        _read_file()
    return _measured.get(case, {})


def forget() -> None:
    """Drop what was measured, in memory and on disk."""
    _measured.clear()
    _read[:] = [_file()]
    _file().unlink(missing_ok=True)


# --- the file: a cache, so a damaged or foreign one counts as empty, and a full or read-only disk is no error ---------


def _file() -> Path:
    """`sparse_linear.json` under `PYKD_CACHE`, else `$XDG_CACHE_HOME/pykd`, else `~/.cache/pykd`."""
    folder = os.environ.get("PYKD_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pykd")
    return Path(folder) / "sparse_linear.json"


def _machine() -> dict[str, Any]:
    return {"version": 1, "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()}"}


def _read_file() -> None:
    _read.append(_file())
    try:
        content = json.loads(_read[0].read_text(encoding="utf-8"))
        if {key: content.get(key) for key in _machine()} != _machine():
            return
        found = {
            Case(*entry["case"]): {
                int(rows): {name: float(times[name]) for name in candidates(int(rows))}
                for rows, times in entry["us"].items()
            }
            for entry in content["cases"]
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    for case, times in found.items():
        _measured.setdefault(case, times)


def _write_file() -> None:
    cases = [{"case": list(case), "us": times} for case, times in sorted(_measured.items())]
    path = _file()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = file.name
            json.dump({**_machine(), "cases": cases}, file)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


if native is not None:
    TABLE.append(Route("sparse_linear", "cpu", f"rows * out * in below {SMALL}", "dense weight kept, torch"))
    TABLE.append(Route("sparse_linear", "cpu", "measured (SparseLinear.tune)", "what was fastest"))
    for _level, _lines in THRESHOLDS.items():
        for _rows, _dense, _expand in _lines:
            _when = f"isa {_level}, up to {_rows:g} rows: density above {_dense:g}"
            TABLE.append(Route("sparse_linear", "cpu", _when, "dense weight kept, torch"))
            if _expand < 1:
                _when = f"isa {_level}, up to {_rows:g} rows: density {_expand:g} to {_dense:g}"
                TABLE.append(Route("sparse_linear", "cpu", _when, "native, expanded on the way"))
    for _level, _dense in QUADS_DENSE.items():
        _when = f"isa {_level}, more than {EXPAND_ROWS} rows, blocks of four rows: density up to {_dense:g}"
        TABLE.append(Route("sparse_linear", "cpu", _when, "native, panels"))
    TABLE.append(Route("sparse_linear", "cpu", "otherwise", "native, panels"))
