"""What a model answers on a test split, by task: tags, next or masked tokens, or texts; and what that is worth."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.data.bundle import DataBundle, batches
from pykd.errors import DataError
from pykd.evaluation.latency import device_of, evaluating
from pykd.evaluation.metrics_text import entity_quality, perplexity, text_quality
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
    texts: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def answers(
    model: nn.Module, data: DataBundle, *, batch_size: int = 64, bertscore_model: str | Path | None = None
) -> Answers:
    """Answers and metrics of a model on the test split of data that is not for classification of whole examples.

    token-classification: seqeval's accuracy, precision, recall, F1. causal-lm, masked-lm: accuracy of the tokens,
    perplexity. seq2seq-lm: BLEU, chrF, TER, ROUGE (and BERTScore) of what the model generates greedily, and the
    perplexity of the references. Raises DataError when scores are not finite.
    """
    found = Answers()
    with evaluating(model):
        TASKS[data.task](model, data, batch_size, found)
    if data.task == "seq2seq-lm":
        found.metrics |= text_quality(found.references, found.texts, bertscore_model=bertscore_model)
    return found


def _tagged(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    _positions(model, data, batch_size, found, shift=False)
    names = [str(name) for name in data.class_names]
    wrong = next((n for n in (*found.labels, *found.predictions) if not 0 <= n < len(names)), None)
    if wrong is not None:
        raise DataError(
            f"class {wrong} is out of range: {data.name!r} names {len(names)} classes; use a model for these"
        )
    rows, first = [], 0
    for count in found.rows:
        rows.append(slice(first, first + count))
        first += count
    tags = [[[names[n] for n in every[row]] for row in rows] for every in (found.labels, found.predictions)]
    found.metrics = entity_quality(*tags)


def _language(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    nll = _positions(model, data, batch_size, found, shift=data.task == "causal-lm")
    right = sum(a == b for a, b in zip(found.labels, found.predictions, strict=True))
    found.metrics = {
        "perplexity": perplexity(nll, len(found.labels)),
        "accuracy": right / max(1, len(found.labels)),
    }


def _generated(model: nn.Module, data: DataBundle, batch_size: int, found: Answers) -> None:
    """Greedy texts, compared as text; the perplexity comes from the references as the decoder reads them."""
    forced = Answers()
    nll = _positions(model, data, batch_size, forced, shift=False)
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
    found.metrics = {"perplexity": perplexity(nll, len(forced.labels))}


def _positions(model: nn.Module, data: DataBundle, batch_size: int, found: Answers, *, shift: bool) -> float:
    """Every counted position's label, prediction and confidence; the sum of -log p(label)."""
    device, nll = device_of(model), 0.0
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
        nll += float(F.cross_entropy(kept, wanted, reduction="sum")) if len(kept) else 0.0
        best, confidence = _best(kept)
        found.labels += wanted.tolist()
        found.predictions += best.tolist()
        found.confidences += [round(value, 6) for value in confidence.tolist()]
        found.rows += counted.sum(1).tolist()
    return nll


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    top, best = scores.max(-1)
    return best, (top - torch.logsumexp(scores, -1)).exp()


#: Task of the data -> what fills the answers.
TASKS: dict[str, Callable[[nn.Module, DataBundle, int, Answers], None]] = {
    "token-classification": _tagged,
    "causal-lm": _language,
    "masked-lm": _language,
    "seq2seq-lm": _generated,
}
