"""One way to call, move and describe models of every origin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.errors import DataError, ModelLoadError
from pykd.models.adapter import logits, move, num_classes, origin, skeleton, unwrap, without_values
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def bert() -> nn.Module:
    return load_huggingface(None, "sequence-classification", num_labels=3, config=BERT).eval()


def text(**extra: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64), **extra}


def test_hugging_face_models_get_what_they_accept(bert: nn.Module) -> None:
    expected = bert(**text()).logits
    batch = text(labels=torch.tensor([0, 99]), weights=torch.ones(2), name="a batch")
    assert torch.equal(logits(bert, batch), expected)
    ids = text(token_type_ids=torch.ones(2, 4, dtype=torch.int64))
    assert not torch.equal(logits(bert, ids), expected), "token_type_ids must reach the model"


def test_torchvision_models_get_pixel_values() -> None:
    model = load_torchvision("squeezenet1_1", 3).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(model, {"pixel_values": images, "labels": torch.zeros(2)}), model(images))


def test_models_with_named_logits_in_a_tuple_work() -> None:
    model = load_torchvision("googlenet", 3, init_weights=False, aux_logits=True).train()
    assert logits(model, {"pixel_values": torch.randn(2, 3, 64, 64)}).shape == (2, 3)


def test_logits_says_what_is_missing(bert: nn.Module) -> None:
    with pytest.raises(DataError, match="ResNet takes x, but the batch holds image, mask; name the input as the model"):
        logits(load_torchvision("resnet18", 2), {"image": torch.ones(1), "mask": torch.ones(1)})
    with pytest.raises(
        DataError, match=r"BertForSequenceClassification takes input_ids, .*but the batch holds nothing"
    ):
        logits(bert, {})
    base = load_huggingface(None, "feature-extraction", config=BERT)
    with pytest.raises(DataError, match=r"BertModel returns .*, which has no logits; use a model with a head"):
        logits(base, text())


def test_move_moves_tensors_only() -> None:
    moved = move(text(name="a"), "meta")
    assert moved["input_ids"].device.type == "meta"
    assert moved["name"] == "a"


def test_num_classes(bert: nn.Module) -> None:
    assert num_classes(bert) == 3
    assert num_classes(load_torchvision("squeezenet1_1", 5)) == 5
    assert num_classes(load_huggingface(None, "masked-lm", config=BERT)) == 50
    assert num_classes(nn.Sequential(nn.Conv2d(3, 7, 1), nn.Flatten())) == 7
    with pytest.raises(ModelLoadError, match="ReLU does not tell how many classes it has"):
        num_classes(nn.ReLU())


def test_origin(bert: nn.Module) -> None:
    expected = {"source": "huggingface", "class": "BertForSequenceClassification", "model_type": "bert", "name": ""}
    assert origin(bert) == expected
    assert origin(load_torchvision("resnet18", 2))["name"] == "resnet18"
    with pytest.raises(ModelLoadError, match="Linear is neither a model of transformers nor carries pykd_origin"):
        origin(nn.Linear(2, 2))


def test_wrappers_are_looked_through() -> None:
    model = load_torchvision("squeezenet1_1", 3)
    assert unwrap(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert num_classes(nn.DataParallel(model)) == 3


def test_skeletons_take_no_memory_and_no_randomness(bert: nn.Module) -> None:
    state = torch.get_rng_state()
    for model in (bert, load_torchvision("squeezenet1_1", 3)):
        before = torch.get_rng_state()
        fresh = skeleton(model)
        assert torch.equal(before, torch.get_rng_state())
        assert all(p.device.type == "meta" for p in fresh.parameters())
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    torch.set_rng_state(state)


class Computing(nn.Module):
    """Built with a number that depends on a tensor's value, as torchvision's RegNets are."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.linspace(0, 1, 3)[1].item()
        self.weight = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_architectures_that_compute_while_built_are_built_on_the_cpu() -> None:
    before = torch.get_rng_state()
    model = without_values(Computing)
    assert model.rate == 0.5
    assert torch.equal(before, torch.get_rng_state())
