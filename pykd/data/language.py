"""Plain texts for language models: the next token of causal models, the masked tokens of masked ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykd.data.bundle import Batch, DataBundle, Item, digest, random_split
from pykd.data.sources import load_tokenizer, preprocessing, tables, texts
from pykd.data.tokens import IGNORED
from pykd.errors import DataError, nearest

TASKS = ("causal-lm", "masked-lm")


class TokenRows:
    """One split: dicts of ``tokens`` (ids), the ``text`` they stand for, and the ``index`` of the row."""

    def __init__(self, rows: Sequence[list[int]], tokenizer: Any) -> None:
        self.rows, self.tokenizer = list(rows), tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return {"tokens": self.rows[index], "index": index, "text": self.tokenizer.decode(self.rows[index])}


class Predict:
    """Collate for causal models: labels are the tokens themselves, padding -100; the loss shifts them by one."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: list[Item]) -> Batch:
        ids, mask = padded([item["tokens"] for item in items], self.pad_id)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


class Mask:
    """Collate for masked models: BERT's 15 % of the tokens, 80 % of them masked, 10 % replaced, 10 % left.

    (Devlin et al. 2019, section 3.1.) What is masked is a function of (seed, row): the same in every epoch, so that a
    teacher's answers can be cached. Labels are the original tokens where one was chosen, -100 elsewhere.
    """

    def __init__(self, pad_id: int, mask_id: int, special: set[int], vocabulary: int, share: float, seed: int) -> None:
        self.pad_id, self.mask_id, self.special = pad_id, mask_id, special
        self.vocabulary, self.share, self.seed = vocabulary, share, seed

    def __call__(self, items: list[Item]) -> Batch:
        pairs = [self._masked(item["tokens"], item["index"]) for item in items]
        ids, mask = padded([tokens for tokens, _ in pairs], self.pad_id)
        labels, _ = padded([labels for _, labels in pairs], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _masked(self, tokens: list[int], index: int) -> tuple[list[int], list[int]]:
        name = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:7], "little"))
        open_ = [place for place, token in enumerate(tokens) if token not in self.special]
        count = max(1, round(self.share * len(open_))) if open_ else 0
        order = torch.randperm(len(open_), generator=generator)[:count].tolist()
        lots = torch.rand(count, generator=generator).tolist()
        others = torch.randint(self.vocabulary, (count,), generator=generator).tolist()
        inputs, labels = list(tokens), [IGNORED] * len(tokens)
        for which, lot, other in zip(order, lots, others, strict=True):
            place = open_[which]
            labels[place] = tokens[place]
            inputs[place] = self.mask_id if lot < 0.8 else other if lot < 0.9 else tokens[place]
        return inputs, labels


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of numbers as one int64 tensor (rows, longest) filled up with ``value``, and where they are (0 or 1).

    >>> padded([[5, 6], [7]], 0)
    (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    return ids, mask


def load_language(
    source: str | Path,
    *,
    tokenizer: Any,
    task: str = "causal-lm",
    text_column: str = "text",
    max_length: int = 128,
    pack: bool = False,
    mask_share: float = 0.15,
    test_source: str | Path | None = None,
    split_column: str | None = None,
    test_size: int = 1000,
    seed: int = 0,
    subset: str | None = None,
) -> DataBundle:
    """Texts as a DataBundle for language models; task "causal-lm" or "masked-lm".

    max_length: tokens a row is cut at, at least 2. pack: the texts of a split one after the other, an end-of-sequence
    token between them where the tokenizer has one, cut into rows of exactly ``max_length``; a shorter rest is left
    out. mask_share: share (0..1) of a row's tokens that a masked model must find, chosen by (seed, row). The held-out
    rows and the other options are those of ``load_text``, without stratification.

    Raises DataError for options out of range, a tokenizer without the tokens that the task needs, and for texts that
    are missing, empty or shorter than two tokens, naming the file and the line.

    Example::

        data = load_language("texts.jsonl", tokenizer="bert-base-uncased", task="masked-lm", max_length=64)
    """
    if task not in TASKS:
        raise DataError(nearest("task", task, TASKS))
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    if not 0 < mask_share <= 1:
        raise DataError(f"mask_share is the share of tokens to find, above 0 and at most 1, got {mask_share}")
    train, test, _ = tables(str(source), test_source, split_column, subset, text_column)
    splits = [texts(table, text_column) for table in (train, test) if table is not None]
    if test is None:
        every = splits.pop()
        parts = random_split(len(every), test_size, seed=seed, name=train.source)
        splits = [[every[row] for row in part] for part in parts]
    tokenizer = load_tokenizer(tokenizer)  # last, because it may come from the hub
    collate = _collate(tokenizer, task, mask_share, seed)
    rows = [_rows(part, tokenizer, max_length, pack=pack, name=str(source)) for part in splits]
    return DataBundle(
        train=TokenRows(rows[0], tokenizer),
        test=TokenRows(rows[1], tokenizer),
        collate=collate,
        class_names=(),
        name=Path(source).name,
        fingerprint=digest([task, mask_share, seed, len(tokenizer), *rows]),
        preprocessing=preprocessing(source, tokenizer, max_length=max_length, pack=pack, seed=seed)
        | ({"mask_share": mask_share} if task == "masked-lm" else {}),
        tokenizer=tokenizer,
        task=task,
    )


def _collate(tokenizer: Any, task: str, share: float, seed: int) -> Predict | Mask:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError("the tokenizer has no padding token: set tokenizer.pad_token")
    if task == "causal-lm":
        return Predict(pad)
    if tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token, which masked-lm needs: set tokenizer.mask_token")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return Mask(pad, tokenizer.mask_token_id, special, len(tokenizer), share, seed)


def _rows(part: list[str], tokenizer: Any, max_length: int, *, pack: bool, name: str) -> list[list[int]]:
    if not pack:
        rows: list[list[int]] = tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
        if short is not None:
            raise DataError(f"{name}: the text {part[short]!r} has fewer than two tokens; delete it, or use pack=True")
        return rows
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for row in tokenizer(part, add_special_tokens=False)["input_ids"] for token in (*row, *end)]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream) - max_length + 1, max_length)]
    if not blocks:
        raise DataError(
            f"{name}: {len(stream)} tokens do not fill one row of max_length={max_length}; choose a smaller"
        )
    return blocks
