"""Small parts of the page: cards, settings as a reader writes them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from pykd.evaluation import plots
from pykd.evaluation.comparison import ratios
from pykd.evaluation.page import cards, data_uri, flatten, plain
from pykd.evaluation.plots import confusion_heatmap, smoothed, stage_bars

from .conftest import make_report


def test_the_cards_say_what_is_good_and_what_is_not() -> None:
    now, before = make_report("now", 3, size_bytes=500_000, speedup_over={"teacher": 0.8}), make_report()
    found = {card.title: card for card in cards(now, before, ratios(now, before))}
    assert (found["Smaller on disk"].value, found["Smaller on disk"].tone) == ("8.0×", "good")
    assert (found["Faster"].value, found["Faster"].tone) == ("0.80×", "bad")
    assert (found["Accuracy"].note, found["Accuracy"].tone) == ("2 more errors on 12", "bad")
    assert found["Fewer weights"].tone == "plain"
    same = cards(before, before, ratios(before, before))
    assert same[2].note == "the same number of errors on 12" and same[2].tone == "good"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (True, "yes"), (False, "no"), (1e-4, "0.0001"), (12345, "12,345"), ([], "none"), ((1, "a"), "1, a")],
)
def test_plain_values(value: object, text: str) -> None:
    assert plain(value) == text


def test_mixed_lists_are_flattened() -> None:
    assert list(flatten({"a": [{"b": 1}, 2]})) == [("a[0].b", "1"), ("a[1]", "2")]


def test_smoothing_keeps_length_and_constants() -> None:
    assert smoothed([2.0] * 30) == [2.0] * 30
    assert smoothed([1.0]) == [1.0]


def test_a_data_uri() -> None:
    assert data_uri("<svg/>") == "data:image/svg+xml;base64,PHN2Zy8+"
    assert data_uri(b"\x89PNG").startswith("data:image/png;base64,")


def test_dollar_signs_in_a_name_are_no_formula() -> None:
    names = ("$\\frac$", "US$ and CA$", "c")
    drawn = confusion_heatmap(dataclasses.replace(make_report(), class_names=names))
    assert all(f"<!-- {name} -->" in drawn for name in names)
    assert "$\\x{$" in stage_bars([make_report("$\\x{$")], 0)


def test_many_trainings_have_panels_in_several_rows() -> None:
    def size(trainings: int) -> tuple[float, float]:
        curves = {
            f"arm {n}": [{"step": float(step), "loss": 1.0 / step} for step in (1, 2, 3)] for n in range(trainings)
        }
        found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plots.training_curves(curves))
        assert found is not None
        return float(found[1]), float(found[2])

    (width, height), (same, tall) = size(plots.PANELS), size(2 * plots.PANELS + 1)
    assert width == same and tall == pytest.approx(3 * height)
