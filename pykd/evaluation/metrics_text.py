"""Quality of texts and of entities, by the libraries that the field reports its numbers with."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykd.errors import DataError
from pykd.evaluation.intervals import RESAMPLES, Intervals, bootstrap


def text_quality(
    references: Sequence[str], predictions: Sequence[str], *, bertscore_model: str | Path | None = None
) -> dict[str, float]:
    """BLEU, chrF and TER (sacreBLEU; 0..100, TER from 0 and lower is better) and ROUGE-1/2/L F1 (rouge-score; 0..1).

    One reference a prediction. bertscore_model: folder of an encoder, for BERTScore F1 (Zhang et al. 2020, eq. 1;
    torchmetrics, the model's last layer, without baseline). Raises DataError for no texts, and when a library is not
    installed.

    >>> found = text_quality(["the cat sat on the mat"], ["the cat sat on the mat"])
    >>> found["bleu"] > 99.9, found["ter"], found["rougeL"]
    (True, 0.0, 1.0)
    """
    if len(references) != len(predictions) or not references:
        raise DataError(f"text_quality needs one prediction a reference, got {len(predictions)} and {len(references)}")
    pair = list(predictions), [list(references)]
    found = {name: float(metric.corpus_score(*pair).score) for name, metric in _of_corpora().items()}
    found |= {name: sum(values) / len(values) for name, values in _rouge(references, predictions).items()}
    if bertscore_model is not None:
        found["bertscore"] = _bertscore(references, predictions, Path(bertscore_model))
    return found


def text_intervals(references: Sequence[str], predictions: Sequence[str]) -> tuple[Intervals, list[float]]:
    """95 % intervals of the metrics of :func:`text_quality` but BERTScore, by bootstrap; and the chrF of each text.

    A metric that is zero in some sample, as can be among few texts, may have no interval.

    >>> text_intervals(["the cat sat"] * 3, ["the cat sat"] * 3)[1]
    [100.0, 100.0, 100.0]
    """
    found: Intervals = {}
    for name, metric in _of_corpora().items():
        try:
            score = metric.corpus_score(list(predictions), [list(references)], n_bootstrap=RESAMPLES)
        except TypeError:  # sacreBLEU cannot average scores when some sample of few texts has nothing in common
            continue
        written = json.loads(score.format(width=4, signature=metric.get_signature().format(), is_json=True))
        if "confidence_mean" in written:  # left out where it is zero
            middle, half = written["confidence_mean"], written["confidence_var"]
            found[name] = (middle - half, middle + half)
    rouge = _rouge(references, predictions)
    names, values = list(rouge), np.array(list(rouge.values()))
    means = bootstrap(lambda n: dict(zip(names, (values @ n / n.sum()).tolist(), strict=True)), len(references))
    chrf = _of_corpora()["chrf"]
    pairs = zip(predictions, references, strict=True)
    return found | means, [float(chrf.sentence_score(text, [reference]).score) for text, reference in pairs]


def _of_corpora() -> dict[str, Any]:
    library = _library("sacrebleu.metrics")
    return {"bleu": library.BLEU(), "chrf": library.CHRF(), "ter": library.TER()}


def _rouge(references: Sequence[str], predictions: Sequence[str]) -> dict[str, list[float]]:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in scores[0]}


def entity_counts(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """Of each sentence: entities that are right, predicted, and labelled (seqeval's).

    >>> entity_counts([["B-PER", "O", "B-PER"]], [["B-PER", "B-PER", "O"]])
    [(1, 2, 2)]
    """
    entities = _library("seqeval.metrics.sequence_labeling").get_entities
    found = []
    for wanted, given in zip(labels, predictions, strict=True):
        gold, got = set(entities(list(wanted))), set(entities(list(given)))
        found.append((len(gold & got), len(got), len(gold)))
    return found


def entity_quality(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of right tags, and micro precision, recall and F1 of whole entities in IOB tags (seqeval), 0..1.

    Raises DataError when seqeval is not installed.

    >>> entity_quality([["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]])["f1"]
    0.0
    """
    seqeval = _library("seqeval.metrics")
    pair = [list(row) for row in labels], [list(row) for row in predictions]
    found = {"accuracy": float(seqeval.accuracy_score(*pair))}
    for name in ("precision", "recall", "f1"):
        found[name] = float(getattr(seqeval, f"{name}_score")(*pair, zero_division=0))
    return found


def perplexity(nll: float, tokens: int) -> float:
    """``exp`` of the mean negative log-likelihood of a token; nll: sum over ``tokens``, natural logarithm.

    >>> round(perplexity(2 * math.log(8), 2), 6)
    8.0
    """
    mean = nll / max(1, tokens)
    return math.exp(mean) if mean < 700 else math.inf


def _bertscore(references: Sequence[str], predictions: Sequence[str], folder: Path) -> float:
    if not folder.is_dir():
        raise DataError(f"bertscore_model {folder} is not a folder; give a local copy of an encoder and its tokenizer")
    score = _library("torchmetrics.functional.text").bert_score
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers
    options = {"model_name_or_path": str(folder), "num_layers": layers, "verbose": False}
    found: Any = score(list(predictions), list(references), **options)
    return float(found["f1"].mean())


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise DataError(f"this metric needs {package}: install it with `pip install 'pykd[text]'`") from None
