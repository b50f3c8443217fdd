"""The tokenizer of the data tests, the scripts as modules, and a model that learned a little from real descriptions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pykd import finetune, save_pretrained
from pykd.data import load_text
from pykd.models.huggingface import load_huggingface

from ..data.conftest import tokenizer

__all__ = ["tokenizer"]

FOLDER = Path(__file__).parents[2] / "benchmarks"
EXTRACT = Path(__file__).parents[1] / "data_files" / "debian_sections.csv"
CONFIG = {
    "model_type": "bert", "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def script(name: str) -> ModuleType:
    """A benchmark as a module, with what lies beside it to import."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    data = load_text(EXTRACT, tokenizer=tokenizer, max_length=24, test_size=60)
    net = load_huggingface(None, "sequence-classification", num_labels=len(data.class_names), config=CONFIG)
    net = finetune(net, data, epochs=2, lr=2e-3, progress=False)
    return save_pretrained(net, tmp_path_factory.mktemp("bench") / "model", tokenizer=tokenizer)
