"""Intervals and paired tests against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pykd.evaluation.intervals import (
    bootstrap,
    class_statistic,
    entity_statistic,
    language_statistic,
    paired_test,
)
from pykd.evaluation.metrics import quality
from pykd.evaluation.metrics_text import entity_counts, entity_quality, text_intervals, text_quality

SENTENCES = ["the cat sat on the mat today", "a dog ran through the park", "rain fell on every roof of the town"] * 8
GENERATED = ["the cat sat on a mat today", "a dog ran through the park", "rain fell upon the roof of a town"] * 8


def test_an_interval_of_shares_is_the_binomial_one() -> None:
    right = np.array([1.0] * 160 + [0.0] * 40)
    low, high = bootstrap(lambda n: {"share": float(n @ right / n.sum())}, 200, resamples=4000)["share"]
    want = stats.binomtest(160, 200).proportion_ci(method="wilson")
    assert low == pytest.approx(want.low, abs=0.012) and high == pytest.approx(want.high, abs=0.012)


def test_the_interval_is_the_seeds() -> None:
    right = np.random.default_rng(0).random(50)
    found = [bootstrap(lambda n: {"mean": float(n @ right / 50)}, 50, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("examples", "resamples", "confidence"), [(0, 10, 0.9), (5, 0, 0.9), (5, 10, 1.0)])
def test_numbers_out_of_range_are_refused(examples: int, resamples: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"bootstrap needs examples, resamples and a confidence in \(0, 1\), got"):
        bootstrap(lambda n: {}, examples, resamples=resamples, confidence=confidence)


def test_the_whole_sample_has_the_metrics_of_the_report() -> None:
    random = np.random.default_rng(3)
    labels, predictions = random.integers(0, 4, 60).tolist(), random.integers(0, 3, 60).tolist()
    want = quality(labels, predictions, ("a", "b", "c", "d", "never"))
    found = class_statistic(labels, predictions, 5)(np.ones(60))
    for name in ("accuracy", "precision", "recall", "f1"):
        assert found[name] == pytest.approx(getattr(want, name)), name


def test_entities_of_the_whole_sample_are_seqevals() -> None:
    labels = [["B-P", "I-P", "O", "B-Q"], ["O", "B-P"], ["O", "O"]]
    predictions = [["B-P", "O", "O", "B-Q"], ["O", "B-P"], ["B-Q", "O"]]
    counts = entity_counts(labels, predictions)
    right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(labels, predictions, strict=True)]
    assert entity_statistic(counts, right, [4, 2, 2])(np.ones(3)) == pytest.approx(entity_quality(labels, predictions))


def test_perplexity_is_of_all_tokens_together() -> None:
    found = language_statistic([4.0, 2.0], [1, 2], [4, 2])(np.ones(2))
    assert found == pytest.approx({"perplexity": np.e, "accuracy": 0.5})


def test_texts_have_intervals_around_their_metrics() -> None:
    metrics = text_quality(SENTENCES, GENERATED)
    intervals, chrf = text_intervals(SENTENCES, GENERATED)
    assert set(intervals) == set(metrics)
    assert all(low <= metrics[name] <= high and low < high for name, (low, high) in intervals.items())
    assert chrf[1] == 100 and len(chrf) == len(SENTENCES)


def test_texts_with_nothing_in_common_have_no_interval_of_overlap() -> None:
    intervals, chrf = text_intervals(["abc def"] * 3, ["xyz"] * 3)
    assert "chrf" not in intervals and chrf == [0.0] * 3 and intervals["rouge1"] == (0, 0)


def test_mcnemar_counts_only_what_differs() -> None:
    now, before = [1.0] * 80 + [1.0] * 9 + [0.0], [1.0] * 80 + [0.0] * 9 + [1.0]
    found = paired_test(now, before)
    assert found.p_value == pytest.approx(stats.binomtest(9, 10).pvalue) and found.significant
    assert found.method == "McNemar's exact test, 9 against 1"
    assert found.difference == pytest.approx(8 / 90) and found.low < found.difference < found.high


def test_scores_are_permuted() -> None:
    random = np.random.default_rng(0)
    before = random.random(40)
    better = paired_test((before + 0.05 + 0.05 * random.random(40)).tolist(), before.tolist())
    assert better.significant and better.method == "permutation test" and better.low > 0
    noise = paired_test((before + 0.1 * (random.random(40) - 0.5)).tolist(), before.tolist())
    assert not noise.significant and noise.low < 0 < noise.high


def test_a_paired_test_needs_pairs() -> None:
    with pytest.raises(ValueError, match="needs both models' scores of the same examples"):
        paired_test([1.0], [1.0, 0.0])
