"""The tokenizer of the data tests, the scripts as modules, and a model that learned a little from real descriptions."""

from __future__ import annotations

import importlib.util
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
    """A benchmark as a module, under the name by which another one beside it imports it."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    data = load_text(EXTRACT, tokenizer=tokenizer, max_length=24, test_size=60)
    net = load_huggingface(None, "sequence-classification", num_labels=len(data.class_names), config=CONFIG)
    net = finetune(net, data, epochs=2, lr=2e-3, progress=False)
    return save_pretrained(net, tmp_path_factory.mktemp("bench") / "model", tokenizer=tokenizer)
