"""Mixed precision: sensitivities are measured, the choice fits the budget and is no worse than one scheme for all."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pykd.quantization import Assignment, assign_bits, quantize
from pykd.quantization.packing import stored_bytes
from pykd.quantization.sensitivity import choose


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()
    with torch.no_grad():  # layers that matter very differently
        for index, parameter in enumerate(model.bert.encoder.parameters()):
            if parameter.dim() == 2:
                parameter *= 8.0 if index % 3 == 0 else 2.0
        model.classifier.weight *= 20
    return model


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 50, (48, 10), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(16)]


def divergence(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        pairs = [[m(**batch).logits.double().log_softmax(-1) for m in (model, other)] for batch in texts()]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


def layer_bytes(model: nn.Module, found: Assignment) -> int:
    return sum(stored_bytes(model.get_submodule(name)) for name in found)


def test_no_worse_than_one_scheme_of_as_many_bytes() -> None:
    candidates = ("w4a16", "nf4", "w8a16", "bf16")
    options: dict[str, Any] = {"samples": 48, "group_size": 16, "candidates": candidates}
    uniform = {scheme: quantize(bert(), scheme, group_size=16) for scheme in candidates}
    for scheme in ("w4a16", "w8a16"):
        model = bert()
        names = list(uniform[scheme].pykd_report[0]["changed"])  # type: ignore[index, operator]
        size = sum(stored_bytes(uniform[scheme].get_submodule(name)) for name in names)
        found = assign_bits(model, texts(), size_bytes=size, **options)
        assert set(found) == set(names) and found.size_bytes <= size == found.budget_bytes
        state = {name: tensor.clone() for name, tensor in bert().state_dict().items()}
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        quantize(model, found, group_size=16)
        assert layer_bytes(model, found) == found.size_bytes
        got, whole = divergence(bert(), model), divergence(bert(), uniform[scheme])
        assert got == pytest.approx(found.divergence, rel=1e-3, abs=1e-9)
        assert whole == pytest.approx(found.uniform[scheme], rel=1e-3, abs=1e-9) and got <= whole * (1 + 1e-6)


def test_between_two_schemes_the_layers_that_matter_get_the_bits() -> None:
    model = bert()
    found = assign_bits(model, texts(), bits=7, samples=48, group_size=16)
    assert set(found.values()) == {"w4a16", "w8a16"} and found.divergence < found.uniform["w4a16"]
    gains = {name: costs["w4a16"] - costs["w8a16"] for name, costs in found.sensitivities.items()}
    assert max(gains, key=lambda name: gains[name]) in {name for name, scheme in found.items() if scheme == "w8a16"}
    quantize(model, found, group_size=16)
    entry = model.pykd_report[0]
    assert entry["assignment"]["sensitivities"] == found.sensitivities and entry["parameters"]["scheme"] == found
    json.dumps(entry, allow_nan=False)
    assert assign_bits(bert(), texts(), bits=7, samples=48, group_size=16) == found  # the same twice


def test_activations_of_one_scale_are_a_candidate() -> None:
    """Measured under what the examples show, and chosen for the layers that 4 bits cost most."""
    found = assign_bits(bert(), texts(), bits=8, samples=48, group_size=16, candidates=("w4a16", "w8a8_static"))
    assert set(found.values()) == {"w4a16", "w8a8_static"} and found.size_bytes <= found.budget_bytes
    better = [name for name, costs in found.sensitivities.items() if costs["w8a8_static"] < costs["w4a16"]]
    assert {name for name, scheme in found.items() if scheme == "w8a8_static"} <= set(better)
    model = quantize(bert(), found, group_size=16, data=texts(), samples=48)
    assert layer_bytes(model, found) == found.size_bytes
    assert divergence(bert(), model) == pytest.approx(found.divergence, rel=0.3)


@pytest.mark.parametrize("family", ["causal", "encoder-decoder"])
def test_padding_does_not_count(family: str) -> None:
    """Whatever stands at padded positions, and however many there are, the measured costs are those of real ones."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model: nn.Module
    if family == "causal":
        shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, pad_token_id=0, **shape)).eval()
    else:
        config = T5Config(vocab_size=50, d_model=48, d_kv=12, d_ff=64, num_layers=1, num_heads=4)
        config.decoder_start_token_id = 0
        model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 50, (8, 10))
    ones, found = torch.ones_like(ids), []
    for padding in (0, 2, 20):
        rest = torch.zeros(8, padding, dtype=torch.int64)
        batch = {"input_ids": torch.cat([ids, rest], 1), "attention_mask": torch.cat([ones, rest], 1)}
        batch["labels"] = torch.cat([ids, rest - 100], 1)
        found.append(assign_bits(model, [batch], bits=7, group_size=16).sensitivities)
    for layer, costs in found[0].items():
        for scheme, cost in costs.items():
            assert [each[layer][scheme] for each in found[1:]] == [pytest.approx(cost, rel=1e-3, abs=1e-10)] * 2


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_greedy_choice_is_near_the_best(data: st.DataObject) -> None:
    """Within the budget; and its cost is at most that of the best choice with a largest step less to spend."""
    schemes = "xyz"[: data.draw(st.integers(2, 3))]
    number = st.integers(1, 30)
    sizes = {name: {s: data.draw(number) for s in schemes} for name in "abcd"}
    costs = {name: {s: float(data.draw(number)) for s in schemes} for name in "abcd"}
    least = sum(min(row.values()) for row in sizes.values())
    budget = least + data.draw(st.integers(0, 60))
    chosen = choose(costs, sizes, budget)

    def total(table: Any, picked: Any) -> float:
        return sum(table[name][scheme] for name, scheme in picked)

    assert total(sizes, chosen.items()) <= budget
    step = max(max(row.values()) - min(row.values()) for row in sizes.values())
    combinations = [list(zip("abcd", picked, strict=True)) for picked in itertools.product(schemes, repeat=4)]
    cheaper = [total(costs, c) for c in combinations if total(sizes, c) <= max(least, budget - step)]
    assert total(costs, chosen.items()) <= min(cheaper)


def test_what_it_refuses() -> None:
    model = bert()
    for options in ({}, {"bits": 5, "size_bytes": 10}, {"bits": 0}):
        with pytest.raises(ValueError, match="the budget is bits per weight or size_bytes, one of them and above 0"):
            assign_bits(model, texts(), **options)
    with pytest.raises(ValueError, match=r"the layers take \d+ bytes in the smallest candidates, more than the budget"):
        assign_bits(model, texts(), bits=2, samples=1)
    with pytest.raises(ValueError, match="candidates names no scheme"):
        assign_bits(model, texts(), bits=5, candidates=())
    with pytest.raises(ValueError, match="candidates are names of schemes, such as 'w4a16', got <class"):
        assign_bits(model, texts(), bits=5, candidates=("w4a16", nn.Linear))
