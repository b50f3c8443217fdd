"""Test examples that a model of tags, texts or tokens gets most wrong, ready to be looked at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pykd.data.bundle import DataBundle, batches
from pykd.evaluation.answers import IGNORED
from pykd.evaluation.examples import shortened
from pykd.evaluation.report import Report

#: Rows that are made ready together.
ROWS = 64


@dataclass(frozen=True)
class WorstExample:
    """One answer that is wrong: index in the test split, its score (the report's ``example_score``), the input, what
    was wanted, and what the model and the baseline said in its place; the baseline's is empty for another test split.
    """

    index: int
    score: float
    text: str
    label: str
    prediction: str
    baseline: str


def worst_examples(report: Report, baseline: Report, data: DataBundle, *, limit: int = 24) -> list[WorstExample]:
    """The wrong answers with the lowest scores, the lowest first, for data that is not for classification.

    Generated texts are shown whole; of tags and tokens the places that are wrong: words with their tags, or tokens.
    Empty for a report without scores of its examples. Raises ValueError for another test split.
    """
    if not report.example_scores:
        return []
    places = _places(report, data)
    beside = baseline if baseline.labels == report.labels else None
    wrong = [i for i, place in enumerate(places) if report.labels[place] != report.predictions[place]]
    wrong.sort(key=lambda index: report.example_scores[index])
    say = SAY[report.task]
    found = []
    for index in wrong[:limit]:
        label, prediction = (say(report, data, index, places[index], each) for each in ("labels", "predictions"))
        other = say(beside, data, index, places[index], "predictions", of=report) if beside is not None else ""
        text = str(data.test[index].get("text", ""))
        score = report.example_scores[index]
        found.append(WorstExample(index, score, *map(shortened, (text, label, prediction, other))))
    return found


def _places(report: Report, data: DataBundle) -> list[slice]:
    """Where in the labels of a report each example's are."""
    if report.task == "seq2seq-lm":
        counts = [1] * len(data.test)
    else:
        first = 1 if report.task == "causal-lm" else 0
        labels = (batch["labels"][:, first:] for batch in batches(data.test, data.collate, ROWS))
        counts = torch.cat([(each != IGNORED).sum(1) for each in labels]).tolist()
    if sum(counts) != len(report.labels) or len(counts) != len(report.example_scores):
        raise ValueError(
            f"{report.name} was measured on {len(report.example_scores)} examples with {len(report.labels)} answers, "
            f"but the test split of {data.name!r} has {len(counts)} with {sum(counts)}; give that data"
        )
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _text(report: Report, data: DataBundle, index: int, place: slice, what: str, of: Report | None = None) -> str:
    """A generated text, or the one that was wanted."""
    return str(data.test[index].get("target", "")) if what == "labels" else report.texts[index]


def _tags(report: Report, data: DataBundle, index: int, place: slice, what: str, of: Report | None = None) -> str:
    """The words whose tag is wrong, each with a tag."""
    item, numbers = data.test[index], getattr(report, what)[place]
    known = list(item.get("labels", ()))[: len(numbers)] == list(report.labels[place])  # no word was left out between
    words: Sequence[str] = item.get("words", ()) if known else ()
    names = report.class_names
    said = [f"{words[k]} {names[numbers[k]]}" if words else names[numbers[k]] for k in _wrong(of or report, place)]
    return ", ".join(said)


def _tokens(report: Report, data: DataBundle, index: int, place: slice, what: str, of: Report | None = None) -> str:
    """The tokens in the places that are wrong."""
    numbers = getattr(report, what)[place]
    found: list[str] = data.tokenizer.convert_ids_to_tokens([numbers[k] for k in _wrong(of or report, place)])
    return " ".join(map(str, found))


def _wrong(report: Report, place: slice) -> list[int]:
    pairs = zip(report.labels[place], report.predictions[place], strict=True)
    return [k for k, (label, said) in enumerate(pairs) if label != said]


#: Task -> how what was wanted ("labels") or answered ("predictions") in the wrong places of a report is written.
SAY: dict[str, Callable[..., str]] = {
    "seq2seq-lm": _text,
    "token-classification": _tags,
    "causal-lm": _tokens,
    "masked-lm": _tokens,
}
