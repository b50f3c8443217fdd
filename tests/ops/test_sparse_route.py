"""Which route serves a sparse call: thresholds, what was measured, and the file that keeps measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pykd.nn.codecs.bitmask import pack
from pykd.ops import sparse_linear as op
from pykd.ops import sparse_route as routes
from pykd.ops.bitmask import PackedSparse
from pykd.ops.dispatch import build_info, native
from pykd.ops.sparse_tuning import gain, measure

pytestmark = pytest.mark.skipif(native is None, reason="without the native module there is nothing to choose from")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in memory and on disk."""
    monkeypatch.setenv("PYKD_CACHE", str(tmp_path))
    monkeypatch.setattr(routes, "_measured", {})
    monkeypatch.setattr(routes, "_read", [])
    return tmp_path / "sparse_linear.json"


def weight(density: float = 0.5, out: int = 64, columns: int = 96) -> PackedSparse:
    return pack(torch.randn(out, columns), torch.rand(out, columns) < density)


def forget_in_memory() -> None:
    routes._measured.clear()
    routes._read.clear()


def test_thresholds(isa: str) -> None:
    assert {routes.by_thresholds(d, r) for d in (0.95, 1.0) for r in (1, 4, 16, 128)} == {"dense"}
    assert {routes.by_thresholds(d, r) for d in (0.05, 0.12) for r in (1, 4, 16, 128)} == {"panels"}
    assert routes.by_thresholds(0.5, 1) == "expand"
    for rows in (1, 2, 4, 5, 32, 33, 10_000):
        assert routes.by_thresholds(0.5, rows) in routes.candidates(rows)
    assert (
        routes.by_thresholds(0.6, 128, quads=True) == "panels" and routes.by_thresholds(1.0, 128, quads=True) == "dense"
    )
    assert routes.by_thresholds(0.5, 1, quads=True) == "expand"
    assert routes.route(0.1, 1, 10, 100) == "dense" and routes.route(0.1, 1, 2000, 1000) == "panels"


def test_the_table_shows_the_routes() -> None:
    rows = [row for row in build_info()["table"] if row["op"] == "sparse_linear" and row["device"] == "cpu"]
    assert any("dense weight kept" in row["implementation"] for row in rows)
    assert any(row["when"].startswith("measured") for row in rows)


def test_a_call_goes_by_what_was_measured_for_the_nearest_number_of_rows() -> None:
    case = routes.case_of(0.5, 2000, 1000, "float32")
    routes.remember(case, {1: {"dense": 3.0, "expand": 1.0, "panels": 2.0}, 64: {"dense": 1.0, "panels": 2.0}})
    assert [routes.route(0.5, rows, 2000, 1000) for rows in (0, 1, 4, 7, 9, 1000)] == [
        "expand", "expand", "expand", "panels", "dense", "dense"
    ]  # fmt: skip
    assert routes.route(0.509, 1, 2000, 1000) == "expand" and routes.route(0.6, 64, 2000, 1000) == "panels"
    assert routes.route(0.5, 64, 2000, 1000, "bfloat16") == "panels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_times_every_route_once_per_case(
    cache: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    packed = weight()
    packed = packed._replace(values=packed.values.to(dtype))
    times = measure(packed, rows=(1, 8, 1))
    assert {rows: set(of) for rows, of in times.items()} == {1: {"dense", "expand", "panels"}, 8: {"dense", "panels"}}
    assert all(us > 0 for of in times.values() for us in of.values()) and gain(times) >= 1
    ran: list[str] = []
    run = op.run_route
    monkeypatch.setattr("pykd.ops.sparse_tuning.run_route", lambda name, *rest: ran.append(name) or run(name, *rest))
    assert measure(packed, rows=(8,)) == {8: times[8]} and ran == []
    forget_in_memory()  # as in another process
    assert measure(packed, rows=(1,)) == {1: times[1]} and ran == []
    measure(packed, rows=(1,), again=True)
    assert set(ran) == {"dense", "expand", "panels"}
    ran.clear()
    measure(packed, rows=(16,))
    assert set(ran) == {"dense", "panels"} and set(json.loads(cache.read_text())["cases"][0]["us"]) == {"1", "8", "16"}


def test_whatever_is_chosen_computes_the_same() -> None:
    packed, x = weight(out=40), torch.randn(4, 96)
    want = F.linear(x, torch.zeros(40, 96).masked_scatter(_mask(packed), packed.values))
    for name in ("dense", "expand", "panels"):
        case = routes.case_of(packed.density, 40, 96, "float32")
        routes.remember(case, {4: {other: 1.0 + (other != name) for other in routes.candidates(4)}})
        assert routes.route(packed.density, 4, 40, 96) == name
        torch.testing.assert_close(op.sparse_linear(x, packed), want)


def _mask(packed: PackedSparse) -> torch.Tensor:
    from pykd.ops.bitmask import unpack_bits

    return unpack_bits(packed.bitmask, packed.in_features)


DAMAGED = [
    "", "[]", "{", '{"version": 1}', '{"version": 1, "machine": "another", "cases": []}', "MACHINE [1]", "MACHINE [{}]",
    'MACHINE [{"case": ["avx2", 1, "float32", 1, 1, 1], "us": {"1": {"dense": "soon"}}}]',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_or_foreign_file_counts_as_empty(cache: Path, content: str) -> None:
    head = json.dumps(routes._machine())[:-1]
    cache.write_text(content.replace("MACHINE", head + ', "cases":') + ("}" if "MACHINE" in content else ""))
    assert routes.remembered(routes.case_of(0.5, 2000, 1000, "float32")) == {}
    assert routes.route(0.05, 1, 2000, 1000) == "panels"


def test_no_room_for_the_file_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKD_CACHE", "/proc/nowhere")
    case = routes.case_of(0.5, 2000, 1000, "float32")
    routes.remember(case, {1: {"dense": 1.0, "expand": 2.0, "panels": 2.0}})
    assert routes.route(0.5, 1, 2000, 1000) == "dense"
    monkeypatch.setenv("PYKD_CACHE", str(cache.parent))
    routes.remember(case, {})
    assert cache.exists() and [path.name for path in cache.parent.iterdir()] == [cache.name]
    routes.forget()
    assert not cache.exists() and routes.remembered(case) == {}


def test_the_folder_follows_the_usual_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert routes._file().name == "sparse_linear.json"
    monkeypatch.delenv("PYKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert routes._file() == Path("/x/pykd/sparse_linear.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/y")
    assert routes._file() == Path("/y/.cache/pykd/sparse_linear.json")


def test_rows_and_empty_weights() -> None:
    for rows in ((), (0,), (1, -2)):
        with pytest.raises(ValueError, match=r"rows are the numbers of rows that calls will have, each at least 1"):
            measure(weight(), rows=rows)
    assert measure(weight(out=0), rows=(1,)) == {} and gain({}) == 1
