"""Models of text behind the service: classes of texts, classes of words, and generated texts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.models.adapter import logits
from pykd.monitoring import HeadInputs
from pykd.serve.predictors import Answer, Input, classify

WORD = re.compile(r"\S+")
#: Tags of words that are part of nothing.
OUTSIDE = "O"


class Reader:
    """The tokenizer of a model: token numbers of texts, cut where the model or the service ends.

    Raises ArtifactError for a tokenizer that only Python runs, too slowly for a service.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ArtifactError(
                f"{name} has no fast tokenizer, which the service reads texts with: save the model with tokenizer.json"
            )
        self.tokenizer: Any = tokenizer
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.max_tokens = min(max_tokens, int(tokenizer.model_max_length), _positions(model))
        self.backend.enable_truncation(self.max_tokens)
        self.pad = int(tokenizer.pad_token_id or 0)

    def read(self, texts: Sequence[str]) -> list[Input]:
        """Token numbers of each text; one without any token (blanks) is read as padding."""
        rows = [one.ids or [self.pad] for one in self.backend.encode_batch_fast(list(texts))]
        return [Input(len(row), row) for row in rows]

    def pad_together(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Token numbers as one tensor; with a mask only where there is padding, which costs time."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        if all(len(row) == longest for row in rows):
            return {"input_ids": ids}
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


class TextClassifier:
    """One class a text."""

    task, takes = "text-classification", "text"

    def __init__(self, model: nn.Module, reader: Reader, labels: tuple[str, ...]) -> None:
        self.model, self.reader, self.labels = model, reader, labels
        self.head = HeadInputs(model)
        config: Any = getattr(model, "config", None)
        self.independent = getattr(config, "problem_type", None) == "multi_label_classification"

    def prepare(self, inputs: Sequence[str]) -> list[Input]:
        return self.reader.read(inputs)

    def compute(self, inputs: list[Input]) -> list[Answer]:
        batch = self.reader.pad_together([one.content for one in inputs])
        return classify(self.model, batch, self.head, independent=self.independent)


class Words(NamedTuple):
    """A text as token numbers; of each word its place in the text and the position of its first token."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    firsts: list[int]


class TokenClassifier:
    """Named parts of a text. Words are what blanks separate; the first token of a word says its tag, as in training."""

    task, takes = "token-classification", "text"

    def __init__(self, model: nn.Module, reader: Reader, labels: tuple[str, ...]) -> None:
        self.model, self.reader, self.labels = model, reader, labels

    def prepare(self, inputs: Sequence[str]) -> list[Input]:
        found = [[match.span() for match in WORD.finditer(text)] for text in inputs]
        words = [[text[first:last] for first, last in spans] for text, spans in zip(inputs, found, strict=True)]
        encoded = self.reader.backend.encode_batch(words, is_pretokenized=True)
        return [self._input(*each) for each in zip(inputs, found, encoded, strict=True)]

    def _input(self, text: str, spans: list[tuple[int, int]], encoding: Any) -> Input:
        first_tokens: dict[int, int] = {}
        for position, word in enumerate(encoding.word_ids):
            if word is not None:
                first_tokens.setdefault(word, position)
        ids = list(encoding.ids) or [self.reader.pad]
        places = [spans[word] for word in first_tokens]
        return Input(len(ids), Words(text, ids, places, list(first_tokens.values())))

    def compute(self, inputs: list[Input]) -> list[Answer]:
        words: list[Words] = [one.content for one in inputs]
        scores = logits(self.model, self.reader.pad_together([one.ids for one in words])).float()
        values, tags = torch.softmax(scores, dim=-1).max(dim=-1)
        answers = []
        for row, one in enumerate(words):
            names = [self.labels[tag] for tag in tags[row, one.firsts].tolist()]
            answers.append(Answer({"entities": entities(one, names, values[row, one.firsts].tolist())}))
        return answers


def entities(words: Words, tags: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Runs of words under one tag: `B-X` begins one and `I-X` goes on with it; other tags stand for a word each.

    The score of a run is the mean of its words'.

    >>> words = Words("at New York", [5, 6, 7], [(0, 2), (3, 6), (7, 11)], [0, 1, 2])
    >>> entities(words, ["O", "B-PLACE", "I-PLACE"], [0.9, 0.8, 0.6])
    [{'label': 'PLACE', 'score': 0.7, 'start': 3, 'end': 11, 'text': 'New York'}]
    """
    runs: list[list[int]] = []
    for position, tag in enumerate(tags):
        if tag == OUTSIDE:
            continue
        begun = bool(runs) and runs[-1][-1] == position - 1 and _kind(tags[position - 1]) == _kind(tag)
        if tag.startswith("I-") and begun:
            runs[-1].append(position)
        else:
            runs.append([position])
    found = []
    for run in runs:
        start, end = words.spans[run[0]][0], words.spans[run[-1]][1]
        score = sum(scores[position] for position in run) / len(run)
        text = words.text[start:end]
        found.append({"label": _kind(tags[run[0]]), "score": score, "start": start, "end": end, "text": text})
    return found


def _kind(tag: str) -> str:
    return tag[2:] if tag[:2] in ("B-", "I-") else tag


class TextGenerator:
    """A text for a text, by greedy search; its score is the geometric mean of its tokens' probabilities."""

    task, takes = "seq2seq", "text"

    def __init__(self, model: nn.Module, reader: Reader, *, max_new_tokens: int) -> None:
        self.model, self.reader, self.max_new_tokens = model, reader, max_new_tokens
        self.labels: tuple[str, ...] = ()

    def prepare(self, inputs: Sequence[str]) -> list[Input]:
        return self.reader.read(inputs)

    def compute(self, inputs: list[Input]) -> list[Answer]:
        batch = self.reader.pad_together([one.content for one in inputs])
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        generating: Any = self.model
        made = generating.generate(
            **batch, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        logs = generating.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
        tokens = made.sequences[:, -logs.shape[1] :]
        ends = torch.tensor(_ends(generating))
        # Everything after the first end is padding.
        counted = (torch.isin(tokens, ends).long().cumsum(dim=1) - torch.isin(tokens, ends).long()) == 0
        scores = (logs.masked_fill(~counted, 0).sum(dim=1) / counted.sum(dim=1)).exp().tolist()
        texts = self.reader.tokenizer.batch_decode(made.sequences, skip_special_tokens=True)
        return [Answer({"text": text, "score": score}) for text, score in zip(texts, scores, strict=True)]


def _ends(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return list(end) if isinstance(end, (list, tuple)) else [-1 if end is None else int(end)]


def _positions(model: nn.Module) -> int:
    """How many tokens a model has positions for; those that tell by their neighbours have any number."""
    tables = (module for name, module in model.named_modules() if name.endswith(("position_embeddings", "wpe")))
    table = next(itertools.chain(tables, [None]))
    rows = getattr(table, "num_embeddings", None)
    if rows is None:
        config: Any = getattr(model, "config", None)
        rows = getattr(config, "max_position_embeddings", None)
        return int(rows) if rows else 1 << 30
    padding = getattr(table, "padding_idx", None)  # families like RoBERTa count positions from behind it
    return int(rows) - (0 if padding is None else padding + 1)
