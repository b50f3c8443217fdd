"""Real package descriptions (made by benchmarks/data/debian.py) and a tokenizer trained on them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

EXTRACT = Path(__file__).parents[1] / "data_files" / "debian_sections.csv"


@pytest.fixture(scope="session")
def extract() -> Path:
    return EXTRACT


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with EXTRACT.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], vocab_size=500))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
