"""Which layers may be touched: patterns, heads, and layers whose weight something else reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pykd.nn.selection import CONVOLUTION, LINEAR, output_heads, replace_layer, select_layers
from pykd.nn.sparse_linear import SparseLinear


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2)
    )


def test_every_layer_but_the_head() -> None:
    selection = select_layers(network(), (*LINEAR, *CONVOLUTION))
    assert list(selection.chosen) == ["0", "2.0", "2.2"] and selection.skipped == {"3": "output head"}


def test_patterns() -> None:
    model = network()
    assert list(select_layers(model, LINEAR, include=["2"]).chosen) == ["2.0", "2.2"]
    assert list(select_layers(model, LINEAR, include=["*.2", "3"]).chosen) == ["2.2", "3"]  # the head, when named
    selection = select_layers(model, LINEAR, exclude=["2.?"], include=["*"])
    assert list(selection.chosen) == ["3"] and selection.skipped == dict.fromkeys(("2.0", "2.2"), "excluded by '2.?'")


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"pattern '2\.5' matches no layer; layers are named like '2\.\d'"):
        select_layers(network(), LINEAR, include=["2.5"])
    with pytest.raises(ValueError, match="pattern 'x' matches no layer"):
        select_layers(network(), LINEAR, exclude=["x"])
    with pytest.raises(ValueError, match=r"no Linear or SparseLinear layer .* \(3: output head\)"):
        select_layers(nn.Sequential(*network()[1:2], nn.ReLU(), nn.ReLU(), nn.Linear(2, 2)), LINEAR)
    with pytest.raises(ValueError, match=r"no Linear .* is left to work on \(it has none\)"):
        select_layers(nn.Sequential(nn.ReLU()), LINEAR)


def test_shared_and_directly_read_weights_are_left() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "out": nn.Linear(4, 5),
            "mix": nn.MultiheadAttention(4, 2),
            "a": nn.Linear(4, 4),
        }
    )
    model["out"].weight = model["embedding"].weight
    selection = select_layers(model, LINEAR, include=["*"])
    assert list(selection.chosen) == ["a"]
    assert selection.skipped == {
        "out": "shares its weight with 'embedding'",
        "mix.out_proj": "nn.MultiheadAttention reads its weight directly",
    }


def test_subclasses_and_the_model_itself_are_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert "is a Scaled" in select_layers(model, LINEAR).skipped["0"]
    with pytest.raises(ValueError, match="is the model itself"):
        select_layers(nn.Linear(2, 2), LINEAR, include=["*"])


def test_heads_of_hugging_face_models() -> None:
    from transformers import (
        BertConfig,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )
    from transformers import BertModel as Base

    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = DistilBertForSequenceClassification(
        DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9)
    )
    assert [n for n, m in model.named_modules() if m in output_heads(model) and isinstance(m, nn.Linear)] == [
        "pre_classifier",
        "classifier",
    ]
    llama = LlamaForCausalLM(LlamaConfig(**shape))
    assert output_heads(llama) >= {llama.lm_head} and llama.model.layers[0].mlp.up_proj not in output_heads(llama)
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    assert t5.lm_head in output_heads(t5)
    base = Base(BertConfig(**shape))
    assert "pooler.dense" in select_layers(base, LINEAR).chosen


def test_a_network_of_convolutions_ends_in_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    assert output_heads(model) == {model[1]} and output_heads(nn.ReLU()) == set()


def test_a_layer_is_replaced_under_all_its_names() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Sequential(shared))
    new = SparseLinear.from_linear(shared)
    replace_layer(model, shared, new)
    assert model[0] is new and model[1][0] is new
