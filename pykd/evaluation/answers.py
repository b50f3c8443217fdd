"""What a model answers on a test split, by task: tags, next or masked tokens, or texts; and what that is worth."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.data.bundle import DataBundle, batches
from pykd.errors import DataError
from pykd.evaluation.intervals import Intervals, bootstrap, entity_statistic, language_statistic
from pykd.evaluation.latency import device_of, evaluating
from pykd.evaluation.metrics_text import entity_counts, entity_quality, perplexity, text_intervals, text_quality
from pykd.models.adapter import logits, move, unwrap

#: Labels with this number count nowhere.
IGNORED = -100


@dataclass
class Answers:
    """labels, predictions, confidences: one a counted position, in order; for texts one an example, their CRC-32.

    rows: how many of them each test example has. texts, references: of generated texts. metrics: by name.
    """

    labels: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: Intervals = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    score: str = ""

    def right(self) -> list[int]:
        """How many of each example's positions are answered rightly."""
        first, found = 0, []
        for count in self.rows:
            pairs = zip(self.labels[first : first + count], self.predictions[first : first + count], strict=True)
            found.append(sum(a == b for a, b in pairs))
            first += count
        return found


def answers(
    model: nn.Module,
    data: DataBundle,
    *,
    batch_size: int = 64,
    bertscore_model: str | Path | None = None,
    intervals: bool = False,
) -> Answers:
    """Answers and metrics of a model on the test split of data that is not for classification of whole examples.

    token-classification: seqeval's accuracy, precision, recall, F1. causal-lm, masked-lm: accuracy of the tokens,
    perplexity. seq2seq-lm: BLEU, chrF, TER, ROUGE (and BERTScore) of what the model generates greedily, and the
    perplexity of the references. intervals: fill intervals and scores too, which takes longer. Raises DataError when
    scores are not finite.
    """
    found = Answers()
    with evaluating(model):
        TASKS[data.task](model, data, batch_size, found)
    if data.task == "seq2seq-lm":
        found.metrics |= text_quality(found.references, found.texts, bertscore_model=bertscore_model)
    if intervals:
        INTERVALS[data.task](found, [str(name) for name in data.class_names])
    return found


def _tagged(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    _positions(model, data, batch_size, found, shift=False)
    names = [str(name) for name in data.class_names]
    wrong = next((n for n in (*found.labels, *found.predictions) if not 0 <= n < len(names)), None)
    if wrong is not None:
        raise DataError(
            f"class {wrong} is out of range: {data.name!r} names {len(names)} classes; use a model for these"
        )
    found.metrics = entity_quality(*_sentences(found, names))


def _sentences(found: Answers, names: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Labels and predictions by name, sentence by sentence."""
    rows, first = [], 0
    for count in found.rows:
        rows.append(slice(first, first + count))
        first += count
    labels, predictions = (
        [[names[n] for n in every[row]] for row in rows] for every in (found.labels, found.predictions)
    )
    return labels, predictions


def _language(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    _positions(model, data, batch_size, found, shift=data.task == "causal-lm")
    found.metrics = {
        "perplexity": perplexity(sum(found.nll), len(found.labels)),
        "accuracy": sum(found.right()) / max(1, len(found.labels)),
    }


def _generated(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    """Greedy texts, compared as text; the perplexity comes from the references as the decoder reads them."""
    forced = Answers()
    _positions(model, data, batch_size, forced, shift=False)
    inner: Any = unwrap(model)
    longest = int(data.preprocessing.get("max_target_length", 128))
    for batch in batches(data.test, data.collate, batch_size):
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        produced = inner.generate(
            **move(inputs, device_of(model)), max_new_tokens=longest, do_sample=False, num_beams=1
        )
        found.texts += data.tokenizer.batch_decode(produced, skip_special_tokens=True)
        wanted = batch["labels"].masked_fill(batch["labels"] == IGNORED, data.tokenizer.pad_token_id)
        found.references += data.tokenizer.batch_decode(wanted, skip_special_tokens=True)
    found.labels = [zlib.crc32(text.encode()) for text in found.references]
    found.predictions = [zlib.crc32(text.encode()) for text in found.texts]
    found.confidences = [1.0] * len(found.texts)
    found.rows = [1] * len(found.texts)
    found.metrics = {"perplexity": perplexity(sum(forced.nll), len(forced.labels))}


def _positions(model: nn.Module, data: DataBundle, batch_size: int, found: Answers, *, shift: bool) -> None:
    """Every counted position's label, prediction and confidence, and each example's sum of -log p(label)."""
    device = device_of(model)
    for batch in batches(data.test, data.collate, batch_size):
        scores, labels = logits(model, move(batch, device)).float(), batch["labels"].to(device)
        if shift:
            scores, labels = scores[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        kept, wanted = scores[counted], labels[counted]
        if not bool(kept.isfinite().all()):
            raise DataError(
                f"the model's scores are not finite for test examples {len(found.rows)} to "
                f"{len(found.rows) + len(labels) - 1}; look for NaN or infinite weights"
            )
        losses = torch.zeros(counted.shape, dtype=torch.float64, device=device)
        losses[counted] = F.cross_entropy(kept, wanted, reduction="none").double()
        found.nll += losses.sum(1).tolist()
        best, confidence = _best(kept)
        found.labels += wanted.tolist()
        found.predictions += best.tolist()
        found.confidences += [round(value, 6) for value in confidence.tolist()]
        found.rows += counted.sum(1).tolist()


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    top, best = scores.max(-1)
    return best, (top - torch.logsumexp(scores, -1)).exp()


def _sure_of_tags(found: Answers, names: Sequence[str]) -> None:
    counts = entity_counts(*_sentences(found, names))
    found.intervals = bootstrap(entity_statistic(counts, found.right(), found.rows), len(counts))
    found.scores = [2 * hits / (given + wanted) if given + wanted else 1.0 for hits, given, wanted in counts]
    found.score = "F1 of each sentence's entities"


def _sure_of_tokens(found: Answers, names: Sequence[str]) -> None:
    found.intervals = bootstrap(language_statistic(found.nll, found.right(), found.rows), len(found.rows))
    found.scores = [-nll / max(1, tokens) for nll, tokens in zip(found.nll, found.rows, strict=True)]
    found.score = "mean log-likelihood of each example's tokens"


def _sure_of_texts(found: Answers, names: Sequence[str]) -> None:
    found.intervals, found.scores = text_intervals(found.references, found.texts)
    found.score = "chrF of each text"


#: Task of the data -> what fills the answers.
TASKS: dict[str, Callable[[nn.Module, DataBundle, int, Answers], None]] = {
    "token-classification": _tagged,
    "causal-lm": _language,
    "masked-lm": _language,
    "seq2seq-lm": _generated,
}
#: Task of the data -> what fills their intervals and scores.
INTERVALS: dict[str, Callable[[Answers, Sequence[str]], None]] = {
    "token-classification": _sure_of_tags,
    "causal-lm": _sure_of_tokens,
    "masked-lm": _sure_of_tokens,
    "seq2seq-lm": _sure_of_texts,
}
