"""Heads and neurons removed from real (tiny) transformers: exact where the removed units did nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pykd.nn import slicing
from pykd.nn.family_config import update_config

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 50,
    "num_labels": 3,
}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**COMMON))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=24, vocab_size=50, num_labels=3)
    return DistilBertForSequenceClassification(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {name: value for name, value in COMMON.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**COMMON, num_key_value_heads=2, pad_token_id=0))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    return Qwen3ForSequenceClassification(Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8, pad_token_id=0))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForSequenceClassification

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    return BartForSequenceClassification(BartConfig(d_model=32, vocab_size=50, num_labels=3, **sides))


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 24}
FAMILIES = {f.__name__: f for f in (bert, distilbert, vit, llama, qwen3, bart)}
#: family: attention blocks, units of each, feed-forward blocks
FOUND = {
    "bert": (2, 4, 2),
    "distilbert": (2, 4, 2),
    "vit": (2, 4, 2),
    "llama": (2, 2, 2),
    "qwen3": (2, 2, 2),
    "bart": (6, 4, 4),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    if family == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    tokens = torch.randint(3, 50, (2, 7))
    tokens[:, -1] = 2  # BART's end of sentence
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**batch).logits
    return logits


def test_every_block_is_found(family: str) -> None:
    model, _ = build(family)
    heads, neurons = slicing.attention_blocks(model), slicing.feed_forward_blocks(model)
    assert (len(heads), heads[0].units, len(neurons)) == FOUND[family]
    assert all(block.head_size == 8 and block.heads == 4 for block in heads)
    assert all(block.units == 24 for block in neurons)


def test_removing_heads_that_do_nothing_changes_nothing(family: str) -> None:
    model, batch = build(family)
    for block in slicing.attention_blocks(model):
        first = block.heads // block.units * block.head_size
        block.output.weight.data[:, :first] = 0  # the first unit is not read
    want = forward(model, batch)
    for block in slicing.attention_blocks(model):
        slicing.keep_heads(block, range(1, block.units))
    update_config(model)
    torch.testing.assert_close(forward(model, batch), want, rtol=1e-5, atol=1e-6)
    left = [block.heads for block in slicing.attention_blocks(model)]
    assert set(left) == {2 if family in ("llama", "qwen3") else 3}


def test_removing_neurons_that_do_nothing_changes_nothing(family: str) -> None:
    model, batch = build(family)
    kept = [*range(0, 7), *range(9, 24)]
    for block in slicing.feed_forward_blocks(model):
        block.output.weight.data[:, 7:9] = 0
    want = forward(model, batch)
    for block in slicing.feed_forward_blocks(model):
        slicing.keep_neurons(block, kept)
    torch.testing.assert_close(forward(model, batch), want, rtol=1e-5, atol=1e-6)
    assert {block.units for block in slicing.feed_forward_blocks(model)} == {22}


def test_scores_name_the_strongest_units(family: str) -> None:
    model, _ = build(family)
    block = slicing.attention_blocks(model)[0]
    per_unit = block.heads // block.units * block.head_size
    block.output.weight.data[:, per_unit:] *= 100  # every unit but the first
    assert slicing.head_scores(block).argmin() == 0
    neurons = slicing.feed_forward_blocks(model)[0]
    neurons.inputs[0].weight.data[5] *= 100
    assert slicing.strongest(slicing.neuron_scores(neurons), 1) == [5]


def test_scores_are_l2_norms() -> None:
    model, _ = build("llama")
    block = slicing.attention_blocks(model)[0]
    parts = [block.query.weight[16:], block.key.weight[8:], block.value.weight[8:], block.output.weight[:, 16:]]
    want = torch.cat([part.flatten() for part in parts]).norm()
    torch.testing.assert_close(slicing.head_scores(block)[1], want)
    neurons = slicing.feed_forward_blocks(model)[0]
    rows = [layer.weight[3] for layer in neurons.inputs]
    torch.testing.assert_close(
        slicing.neuron_scores(neurons)[3], torch.cat([*rows, neurons.output.weight[:, 3]]).norm()
    )


def test_pruned_transformers_keep_training(family: str) -> None:
    model, batch = build(family)
    for block in slicing.attention_blocks(model):
        slicing.keep_heads(block, [block.units - 1])
    for neurons in slicing.feed_forward_blocks(model):
        slicing.keep_neurons(neurons, [0, 3, 5])
    model.train()
    model(**batch).logits.sum().backward()
    for block in slicing.attention_blocks(model):
        assert block.value.weight.grad is not None and block.value.weight.grad.shape == block.value.weight.shape


def test_head_attributes_follow() -> None:
    model, _ = build("bert")
    block = slicing.attention_blocks(model)[0]
    slicing.keep_heads(block, [0, 2])
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_uniform_change_is_rebuilt_from_the_config(family: str) -> None:
    model, batch = build(family)
    for block in slicing.attention_blocks(model):
        slicing.keep_heads(block, [1])
    for neurons in slicing.feed_forward_blocks(model):
        slicing.keep_neurons(neurons, range(10))
    update_config(model)
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(forward(again, batch), forward(model, batch))


def test_a_config_that_cannot_say_it_is_left_alone() -> None:
    model, _ = build("bert")
    for block in slicing.attention_blocks(model):
        slicing.keep_heads(block, [0, 1])
    update_config(model)
    assert model.config.num_attention_heads == 4  # 32 / 2 would mean heads of 16


def test_an_uneven_change_leaves_the_config_alone() -> None:
    model, _ = build("bert")
    slicing.keep_neurons(slicing.feed_forward_blocks(model)[0], range(10))
    update_config(model)
    assert model.config.intermediate_size == 24


def test_update_config_of_a_model_without_one() -> None:
    update_config(nn.Linear(2, 2))  # nothing to correct, nothing raised


def test_heads_with_a_position_bias_of_their_own_are_left_out() -> None:
    model, _ = build("vit")
    attention = model.get_submodule("vit.layers.0.attention")
    attention.bias_table = nn.Embedding(10, 4)
    assert [block.name for block in slicing.attention_blocks(model)] == ["vit.layers.1.attention"]


@pytest.mark.parametrize(
    ("units", "sparsity", "want"), [(8, 0.5, 4), (8, 0.0, 8), (8, 1.0, 1), (3, 0.9, 1), (7, 0.3, 5)]
)
def test_kept_count(units: int, sparsity: float, want: int) -> None:
    assert slicing.kept_count(units, sparsity) == want


def test_frozen_parameters_stay_frozen() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    slicing.keep_rows(linear, torch.tensor([0, 2]))
    slicing.keep_columns(linear, torch.tensor([1]))
    assert not linear.weight.requires_grad and linear.weight.shape == (2, 1) and linear.bias.shape == (2,)
