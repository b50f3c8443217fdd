"""PSI and KS: their laws by hypothesis, their numbers by hand, and alarms for shifted inputs only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykd.monitoring.drift import (
    Thresholds,
    cut_points,
    histogram,
    kolmogorov_smirnov,
    label_drift,
    number_drift,
    stability_index,
    stability_p_value,
)

COUNTS = st.lists(st.integers(0, 500), min_size=2, max_size=12).filter(any)
VALUES = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=60)


@settings(deadline=None)  # the first call imports scipy
@given(expected=COUNTS, data=st.data())
def test_the_index_is_a_symmetric_distance(expected: list[int], data: st.DataObject) -> None:
    actual = data.draw(st.lists(st.integers(0, 500), min_size=len(expected), max_size=len(expected)).filter(any))
    index = stability_index(expected, actual)
    assert 0 <= index < math.inf and index == pytest.approx(stability_index(actual, expected))
    assert stability_index(expected, expected) == 0
    order = data.draw(st.permutations(range(len(expected))))
    shuffled = [[counts[i] for i in order] for counts in (expected, actual)]
    assert stability_index(*shuffled) == pytest.approx(index)
    assert 0 <= stability_p_value(index, sum(expected), sum(actual), len(expected)) <= 1


def test_the_index_by_hand() -> None:
    shares = (100.5 / 201, 100.5 / 201), (150.5 / 201, 50.5 / 201)
    by_hand = sum((a - e) * math.log(a / e) for e, a in zip(*shares, strict=True))
    assert stability_index([100, 100], [150, 50]) == pytest.approx(by_hand)


@given(values=VALUES, bins=st.integers(2, 12))
def test_every_value_is_in_one_bin(values: list[float], bins: int) -> None:
    cuts = cut_points(values, bins)
    counts = histogram(values, cuts)
    assert counts.sum() == len(values) and len(counts) == len(cuts) + 1 and (np.diff(cuts) > 0).all()


@settings(max_examples=30, deadline=None)
@given(expected=VALUES, actual=VALUES)
def test_ks_is_the_largest_distance_of_the_distributions(expected: list[float], actual: list[float]) -> None:
    statistic, p_value = kolmogorov_smirnov(expected, actual)
    places = np.array([*expected, *actual])
    shares = [(np.array(values)[:, None] <= places).mean(0) for values in (expected, actual)]
    assert statistic == pytest.approx(abs(shares[0] - shares[1]).max())
    assert 0 <= p_value <= 1 and kolmogorov_smirnov(actual, expected)[0] == pytest.approx(statistic)
    assert kolmogorov_smirnov(expected, expected) == (0, 1)
    doubled = kolmogorov_smirnov([2 * v + 1 for v in expected], [2 * v + 1 for v in actual])
    assert doubled[0] == pytest.approx(statistic)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(100, 500))
def test_rows_of_the_same_kind_raise_no_alarm_and_shifted_ones_do(seed: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    expected = generator.gamma(2.0, size=1000)
    same, shifted = generator.gamma(2.0, size=rows), generator.gamma(2.0, size=rows) + 2.0
    assert not number_drift("length", expected.tolist(), same.tolist(), Thresholds()).alarm
    found = number_drift("length", expected.tolist(), shifted.tolist(), Thresholds())
    assert found.alarm and found.psi > 0.25 and found.p_value < 1e-3
    assert found.sentence().startswith(f"length has shifted: PSI {found.psi:.3f}, KS {found.ks:.3f} over {rows} rows")


def test_a_constant_quantity_drifts_when_it_changes() -> None:
    for value in (63.0, 65.0):
        assert number_drift("length", [64.0] * 300, [value] * 200, Thresholds()).alarm
    assert not number_drift("length", [64.0] * 300, [64.0] * 200, Thresholds()).alarm


def test_classes_drift_by_their_shares() -> None:
    before = {"a": 500, "b": 300, "c": 200}
    assert not label_drift(before, {"a": 100, "b": 60, "c": 40}, Thresholds()).alarm
    found = label_drift(before, {"a": 30, "b": 60, "d": 110}, Thresholds())
    assert found.alarm and found.ks is None and found.sentence().startswith("label has shifted: PSI")
    assert label_drift({"a": 5}, {"a": 7}, Thresholds()).p_value == 1.0


def test_a_large_index_of_few_rows_is_chance() -> None:
    found = label_drift({"a": 10, "b": 10}, {"a": 10, "b": 2}, Thresholds(minimum=1))
    assert found.psi > 0.25 and not found.alarm


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two histograms of the same bins .*, got \[1.0\], \[1.0, 2.0\]"):
        stability_index([1], [1, 2])
    with pytest.raises(ValueError, match="rows in both"):
        stability_index([0, 0], [1, 2])
    with pytest.raises(ValueError, match="expected two samples with values, got 0 and 1"):
        kolmogorov_smirnov([], [1.0])
    with pytest.raises(ValueError, match="psi must be above 0, got 0"):
        Thresholds(psi=0)
    with pytest.raises(ValueError, match=r"f1 is a share between 0 and 1, got 2"):
        Thresholds(f1=2)
    with pytest.raises(ValueError, match=r"expected 1 <= minimum <= window .*, got minimum=9, window=5"):
        Thresholds(minimum=9, window=5)
