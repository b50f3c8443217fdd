"""A tiny teacher, routers made of it, and a task with easy and difficult rows, for the tests of the router."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from pykd.data.bundle import DataBundle, Item
from pykd.models.huggingface import load_huggingface
from pykd.models.router import from_teacher
from pykd.training import finetune

WORDS, LENGTH = 40, 12
TINY = {"model_type": "bert", "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 16}  # fmt: skip


def rows(count: int, seed: int) -> list[Item]:
    """Words with fixed weights, whose sum decides: the nearer to zero, the more difficult."""
    weights = torch.linspace(-1, 1, WORDS)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, LENGTH + 1, (1,), generator=generator))
        tokens = torch.randint(2, WORDS, (length,), generator=generator)
        label = int(weights[tokens].sum() > 0)
        tokens[0] = 1
        found.append({"input_ids": tokens, "labels": label})
    return found


def collate(items: list[Item]) -> dict[str, Tensor]:
    """A batch, padded to its longest row."""
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([i["labels"] for i in items])}


@functools.cache
def data() -> DataBundle:
    """1,600 rows to train on and 400 held out."""
    options = {"class_names": ("no", "yes"), "name": "votes", "fingerprint": "votes"}
    return DataBundle(train=rows(1600, 0), test=rows(400, 1), collate=collate, **options)


@functools.cache
def _teacher() -> Any:
    torch.manual_seed(0)
    model = load_huggingface(None, "sequence-classification", num_labels=2, config=TINY)
    return finetune(model, data(), epochs=3, batch_size=64, lr=2e-3, progress=False).eval()


def teacher() -> Any:
    """A BERT of four layers that was trained on the task."""
    return copy.deepcopy(_teacher())


def router(**options: Any) -> Any:
    """A router with two shared and two deep layers, not trained."""
    return from_teacher(_teacher(), **{"experts": 3, "router_size": 16, **options})


def batch(count: int = 16) -> dict[str, Tensor]:
    """Held-out rows."""
    return collate([data().test[index] for index in range(count)])
