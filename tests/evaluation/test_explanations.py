"""Integrated gradients of models whose reasons are known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykd
from pykd.data import load_digits, load_text
from pykd.data.bundle import DataBundle, stack
from pykd.errors import DataError
from pykd.evaluation import explanation_similarity
from pykd.evaluation.explanations import attributions
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision


class Pixels(nn.Module):
    """Class scores that are linear in the pixels, so that their attributions are known."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.flatten(1) @ self.weight.T


@pytest.fixture
def squares() -> DataBundle:
    torch.manual_seed(0)
    items = [{"pixel_values": torch.rand(1, 3, 3), "labels": i % 2} for i in range(6)]
    return DataBundle(train=items, test=items, collate=stack, class_names=("a", "b"), name="squares")


def test_attributions_of_a_linear_model_are_weight_times_input(squares: DataBundle) -> None:
    model = Pixels(torch.randn(2, 9))
    batch = squares.collate([squares.test[0]])
    found = attributions(model, batch, 1, squares, steps=4)
    torch.testing.assert_close(found.float(), (model.weight[1] * batch["pixel_values"].flatten()).detach())


def test_the_same_reasons_are_alike_and_opposite_ones_are_not(squares: DataBundle) -> None:
    model = Pixels(torch.randn(2, 9))
    same = explanation_similarity(Pixels(3 * model.weight.detach()), model, squares, steps=4)
    assert same.cosine == pytest.approx(1) and same.rank_correlation == pytest.approx(1) and same.examples == 6
    other = explanation_similarity(Pixels(-model.weight.detach()), model, squares, steps=4, examples=2)
    assert other.cosine == pytest.approx(-1) and other.rank_correlation == pytest.approx(-1) and other.examples == 2
    assert other.sentence() == "integrated gradients of 2 examples: cosine -1.000, rank correlation -1.000"


def test_a_model_without_reasons_is_told(squares: DataBundle) -> None:
    with pytest.raises(DataError, match="none of 6 examples of 'squares' has attributions that differ"):
        explanation_similarity(Pixels(torch.zeros(2, 9)), Pixels(torch.randn(2, 9)), squares)


@pytest.fixture
def texts(tmp_path: Path, word_tokenizer: Callable[..., Any]) -> DataBundle:
    rows = [f"the {noun} is number {i},{'x' if i % 2 else 'y'}" for i, noun in enumerate(["game", "font"] * 6)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return load_text(path, tokenizer=word_tokenizer(rows, framed=True), test_size=4, max_length=12)


def test_texts_and_compressed_models(texts: DataBundle) -> None:
    config = {"model_type": "bert", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    torch.manual_seed(1)
    model = load_huggingface(None, task="sequence-classification", num_labels=2, config=config).eval()
    packed = load_huggingface(None, task="sequence-classification", num_labels=2, config=config).eval()
    packed.load_state_dict(model.state_dict())
    pykd.quantize(packed, "w8a16", embeddings="w8a16")
    batch = texts.collate([texts.test[0]])
    found = attributions(model, batch, 0, texts, steps=64)
    assert found.shape == batch["input_ids"].shape[1:]
    special = [int(i) in texts.tokenizer.all_special_ids for i in batch["input_ids"][0]]
    assert any(special) and all(float(value) == 0 for value, s in zip(found, special, strict=True) if s)
    alike = explanation_similarity(packed, model, texts, examples=3, steps=8)
    assert alike.cosine > 0.95 and alike.examples == 3


def test_convolutional_networks() -> None:
    data = load_digits(image_size=32, test_size=20)
    torch.manual_seed(0)
    model = load_torchvision("resnet18", num_classes=10).eval()
    found = explanation_similarity(model, model, data, examples=1, steps=2)
    assert found.cosine == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_explained_is_refused(squares: DataBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pixels(torch.randn(2, 9))
    with pytest.raises(ValueError, match="examples and steps must be at least 1, got 0 and 32"):
        explanation_similarity(model, model, squares, examples=0)
    tags = DataBundle(train=squares.train, test=squares.test, collate=stack, class_names=("a", "b"), name="tags",
                      task="token-classification")  # fmt: skip
    with pytest.raises(DataError, match="are compared for classifiers; 'tags' is for token-classification"):
        explanation_similarity(model, model, tags)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(DataError, match="explanations need captum: install it"):
        explanation_similarity(model, model, squares)
