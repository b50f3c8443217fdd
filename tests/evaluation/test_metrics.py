"""Quality against numbers worked out by hand."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from pykd.errors import DataError
from pykd.evaluation.metrics import quality


def test_by_hand() -> None:
    scored = quality([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], ("a", "b", "c"))
    assert scored.accuracy == pytest.approx(4 / 6)
    assert scored.precision == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert scored.recall == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scored.f1 == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert scored.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert [c.support for c in scored.per_class] == [3, 2, 1]
    assert scored.per_class[0].name == "a" and scored.per_class[0].recall == pytest.approx(2 / 3)


def test_a_class_that_does_not_occur_is_left_out_of_the_means() -> None:
    scored = quality([0, 1], [0, 1], ("a", "b", "never"))
    assert (scored.precision, scored.recall, scored.f1) == (1.0, 1.0, 1.0)
    assert scored.per_class[2].support == 0


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    scored = quality([0, 0, 1], [0, 0, 0], ("a", "b"))
    assert scored.precision == pytest.approx((2 / 3 + 0) / 2) and scored.recall == pytest.approx(0.5)


def test_numbers_outside_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"label 3 is out of range: the data names 2 classes \(0\.\.1\)"):
        quality([0, 3], [0, 1], ("a", "b"))
    with pytest.raises(DataError, match="prediction -1 is out of range"):
        quality([0, 1], [0, -1], ("a", "b"))


def test_without_scikit_learn_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        DataError, match=r"evaluation needs scikit-learn: install it with `pip install 'pykd\[reports\]'`"
    ):
        quality([0], [0], ("a",))
