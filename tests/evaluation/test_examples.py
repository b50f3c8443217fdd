"""The mistakes a report shows: the surest first, pictures from pixels, words from text."""

from __future__ import annotations

import io

import pytest
import torch

from pykd.data.bundle import DataBundle, stack
from pykd.evaluation.examples import flips, worst_confusions, wrong_examples

from .conftest import make_report


def bundle(**item: object) -> DataBundle:
    items = [{**item, "labels": i % 3} for i in range(12)]
    return DataBundle(train=items, test=items, collate=stack, class_names=("a", "b", "c"), name="made")


def test_the_surest_mistakes_come_first() -> None:
    report = make_report("now", wrong=3, confidences=(0.5, 0.9, 0.7, *[1.0] * 9))
    found = wrong_examples(report, make_report(wrong=1), bundle(text="words"), limit=2)
    assert [(e.index, e.label, e.prediction, e.baseline, e.confidence) for e in found] == [
        (1, "b", "c", "b", 0.9),
        (2, "c", "a", "c", 0.7),
    ]
    assert found[0].text == "words" and found[0].png == b""


def test_a_long_text_is_cut() -> None:
    (example,) = wrong_examples(make_report(), make_report(), bundle(text="word " * 200))
    assert len(example.text) < 330 and example.text.endswith("word ...")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_a_png_of_the_full_range(channels: int) -> None:
    from matplotlib.image import imread

    pixels = torch.linspace(-3, 5, 16).reshape(1, 4, 4).expand(channels, -1, -1)
    (example,) = wrong_examples(make_report(), make_report(), bundle(pixel_values=pixels))
    image = imread(io.BytesIO(example.png))
    assert image.shape[:2] == (4, 4) and image[0, 0, 0] == 0 and image[3, 3, 0] == 1 and example.text == ""


def test_a_picture_of_one_color_is_no_division_by_zero() -> None:
    (example,) = wrong_examples(make_report(), make_report(), bundle(pixel_values=torch.ones(3, 4, 4)))
    assert example.png.startswith(b"\x89PNG")


def test_flips_count_both_ways() -> None:
    assert flips(make_report("now", wrong=3), make_report(wrong=1)) == (2, 0)
    assert flips(make_report("now", wrong=1), make_report(wrong=3)) == (0, 2)


def test_the_worst_confusions() -> None:
    assert worst_confusions(make_report(wrong=4)) == [("a", "b", 2), ("b", "c", 1), ("c", "a", 1)]
    assert worst_confusions(make_report(wrong=4), limit=1) == [("a", "b", 2)]


def test_other_data_is_refused() -> None:
    report = make_report("now", labels=(0,), predictions=(1,), confidences=(0.5,))
    with pytest.raises(ValueError, match="now was measured on 1 examples, but the test split of 'made' has 12"):
        wrong_examples(report, make_report(), bundle(text="x"))
