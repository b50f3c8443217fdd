"""Tables, ratios, and the sentences that admit when a stage brought nothing."""

from __future__ import annotations

import json

import pytest

import pykd
from pykd.evaluation import Report
from pykd.evaluation.comparison import compare, ratios, remark

from .conftest import make_report


def test_ratios_are_to_the_baseline(reports: list[Report]) -> None:
    found = pykd.compare(reports)
    assert [r.smaller for r in found.ratios] == [1.0, 4.0, 8.0]
    assert [r.more_errors for r in found.ratios] == [0, 1, 2]
    assert found.ratios[1].faster == 2.0 and found.ratios[1].paired
    assert found.ratios[2].faster == 1.0 and not found.ratios[2].paired
    assert found.ratios[1].agreement == pytest.approx(11 / 12)
    assert pykd.compare(reports, baseline=1).ratios[2].smaller == 2.0
    assert pykd.compare(reports, baseline=-1).baseline == 2


def test_the_table_is_aligned_and_complete(reports: list[Report]) -> None:
    lines = compare(reports).text().splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[0].split()[:5] == ["model", "accuracy", "precision", "recall", "F1"]
    assert lines[3].split()[0] == "1-distill" and "4.00x" in lines[3] and "2.00x" in lines[3]


def test_a_narrow_terminal_gets_the_table_in_parts(reports: list[Report]) -> None:
    parts = compare(reports).text(width=60)
    blocks = parts.split("\n\n")[:-1]
    assert len(blocks) == 3 and max(len(line) for block in blocks for line in block.splitlines()) <= 60
    assert all(block.startswith("model ") and "2-prune" in block for block in blocks)
    assert all(cell in parts for row in compare(reports).cells() for cell in row)
    assert len(compare(reports).text(width=1).split("\n\n")) == 16, "each part has at least one column"


def test_markdown_is_a_table_then_remarks(reports: list[Report]) -> None:
    text = compare([make_report("a|b"), *reports[1:]]).markdown()
    assert "| a\\|b |" in text and text.splitlines()[1].startswith("| --- | ---: |")
    assert "- no gain in speed here: 2-prune is smaller than 1-distill" in text


def test_a_gain_in_both_needs_no_remark() -> None:
    now = make_report("small", size_bytes=10, speedup_over={"teacher": 1.5})
    assert remark(now, make_report()) is None


@pytest.mark.parametrize(
    ("size_bytes", "speedup", "sentence"),
    [
        (
            3_990_000,
            1.02,
            "no gain here: now is neither smaller (4.00 -> 3.99 MB) nor faster (1.02x the speed) than teacher",
        ),
        (
            2_000_000,
            0.7,
            "no gain in speed here: now is smaller than teacher (4.00 -> 2.00 MB), but runs at 0.70x the speed",
        ),
        (4_000_000, 2.0, "no gain in size here: now runs at 2.00x the speed of teacher, but its file is not smaller"),
        (5_000_000, 0.5, "no gain here: now is neither smaller (4.00 -> 5.00 MB) nor faster (0.50x the speed)"),
    ],
)
def test_no_gain_is_said(size_bytes: int, speedup: float, sentence: str) -> None:
    found = remark(make_report("now", size_bytes=size_bytes, speedup_over={"teacher": speedup}), make_report())
    assert found is not None and found.startswith(sentence)


def test_without_alternating_rounds_the_p50_counts() -> None:
    step = ratios(make_report("now", latency_p50_ms=4.0), make_report())
    assert step.faster == 2.5 and not step.paired


def test_unequal_test_sets_have_no_agreement() -> None:
    other = make_report("other", labels=(0,), predictions=(0,))
    found = compare([make_report(), other])
    assert found.ratios[1].agreement is None and found.cells()[2][-1] == "-"


def test_it_goes_through_json(reports: list[Report]) -> None:
    values = json.loads(json.dumps(compare(reports).to_dict(), allow_nan=False))
    assert values["baseline"] == "teacher" and values["ratios"]["2-prune"]["smaller"] == 8.0
    assert len(values["remarks"]) == 1


def test_reports_must_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="reports with distinct names, got a, a"):
        compare([make_report("a"), make_report("a")])
    with pytest.raises(ValueError, match="reports with distinct names, got none"):
        compare([])


def test_the_baseline_must_be_there(reports: list[Report]) -> None:
    with pytest.raises(ValueError, match="baseline 3 is out of range: there are 3 reports"):
        compare(reports, baseline=3)
