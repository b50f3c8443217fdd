"""One number for the quality of a model: a weighted mean of its task's metrics, each brought to 0..1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pykd.errors import nearest

#: Metric -> (its share of perfection, 0..1; how a report writes that).
SHARES: dict[str, tuple[Callable[[float], float], str]] = {
    "accuracy": (lambda value: value, "accuracy"),
    "bertscore": (lambda value: value, "BERTScore"),
    "bleu": (lambda value: value / 100, "BLEU / 100"),
    "chrf": (lambda value: value / 100, "chrF / 100"),
    "f1": (lambda value: value, "F1"),
    "perplexity": (lambda value: 1 / max(1.0, value), "1 / perplexity"),
    "precision": (lambda value: value, "precision"),
    "recall": (lambda value: value, "recall"),
    "rouge1": (lambda value: value, "ROUGE-1"),
    "rouge2": (lambda value: value, "ROUGE-2"),
    "rougeL": (lambda value: value, "ROUGE-L"),
    "ter": (lambda value: 1 - value / 100, "(1 - TER / 100)"),
}
#: Task -> weights of its metrics, unless the caller has others.
WEIGHTS: dict[str, dict[str, float]] = {
    "classification": {"accuracy": 0.5, "f1": 0.5},
    "token-classification": {"accuracy": 0.2, "f1": 0.8},
    "seq2seq-lm": {"chrf": 0.4, "bleu": 0.2, "ter": 0.2, "rougeL": 0.2},
    "causal-lm": {"accuracy": 0.5, "perplexity": 0.5},
    "masked-lm": {"accuracy": 0.5, "perplexity": 0.5},
}


def quality_score(metrics: Mapping[str, float], weights: Mapping[str, float]) -> tuple[float, str]:
    """The weighted mean, 0..1, and its formula. Weights need not sum to 1; shares outside 0..1 count as its ends.

    Raises ValueError for a weight below 0, for none above, and for a metric without value or that has no share.

    >>> quality_score({"chrf": 50.0, "ter": 120.0}, {"chrf": 3, "ter": 1})
    (0.375, '0.75 chrF / 100 + 0.25 (1 - TER / 100), each between 0 and 1')
    """
    whole = sum(weights.values())
    if any(weight < 0 for weight in weights.values()) or whole <= 0:
        raise ValueError(f"the weights of a score must be at least 0, and one above it, got {dict(weights)}")
    score, terms = 0.0, []
    for name, weight in weights.items():
        if name not in SHARES or name not in metrics:
            raise ValueError(nearest("metric", name, set(SHARES) & set(metrics)))
        share, shown = SHARES[name]
        score += weight / whole * min(1.0, max(0.0, share(metrics[name])))
        terms.append(f"{weight / whole:g} {shown}")
    return score, f"{' + '.join(terms)}, each between 0 and 1"
