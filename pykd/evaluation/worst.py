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
    reports = [report, baseline] if baseline.labels == report.labels else [report]
    wrong = [i for i, place in enumerate(places) if report.labels[place] != report.predictions[place]]
    wrong.sort(key=lambda index: report.example_scores[index])
    found = []
    for index in wrong[:limit]:
        label, prediction, *other = SAY[report.task](reports, data, index, places[index])
        shown = (str(data.test[index].get("text", "")), label, prediction, *(other or [""]))
        found.append(WorstExample(index, report.example_scores[index], *map(shortened, shown)))
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


def _text(reports: Sequence[Report], data: DataBundle, index: int, place: slice) -> list[str]:
    """The generated texts, after the one that was wanted."""
    return [str(data.test[index].get("target", "")), *(report.texts[index] for report in reports)]


def _tags(reports: Sequence[Report], data: DataBundle, index: int, place: slice) -> list[str]:
    """The words whose tag is wrong, each with a tag."""
    item, tags, names = data.test[index], reports[0].labels[place], reports[0].class_names
    known = list(item.get("labels", ()))[: len(tags)] == list(tags)  # no word was left out between
    words: Sequence[str] = item.get("words", ()) if known else ()
    return [
        ", ".join(f"{words[k]} {names[tag]}" if words else names[tag] for k, tag in numbers.items())
        for numbers in _wrong(reports, place)
    ]


def _tokens(reports: Sequence[Report], data: DataBundle, index: int, place: slice) -> list[str]:
    """The tokens in the places that are wrong."""
    convert = data.tokenizer.convert_ids_to_tokens
    return [" ".join(map(str, convert(list(numbers.values())))) for numbers in _wrong(reports, place)]


def _wrong(reports: Sequence[Report], place: slice) -> list[dict[int, int]]:
    """Where the first report is wrong, what was wanted, then what each report has there."""
    wanted, said = reports[0].labels[place], [report.predictions[place] for report in reports]
    wrong = [k for k, (label, found) in enumerate(zip(wanted, said[0], strict=True)) if label != found]
    return [{k: numbers[k] for k in wrong} for numbers in (wanted, *said)]


#: Task -> how what was wanted, and after it what each report answered, is written where the first report is wrong.
SAY: dict[str, Callable[[Sequence[Report], DataBundle, int, slice], list[str]]] = {
    "seq2seq-lm": _text,
    "token-classification": _tags,
    "causal-lm": _tokens,
    "masked-lm": _tokens,
}
