"""Encoder layers in fewer passes say what they said before, and step aside wherever someone wants more than that."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

import pykd
from pykd.models import fused
from pykd.models.fused import FusedForward, fuse
from pykd.ops.dispatch import native

#: Family -> how its configuration calls the sizes.
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {**SIZES, "max_position_embeddings": 64} for name in ("bert", "roberta", "camembert", "xlm-roberta")},
    "electra": {**SIZES, "embedding_size": 24},
    "distilbert": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80},
}


def model_of(family: str, *, head: Any = AutoModelForSequenceClassification, **options: Any) -> Any:
    how = {"attn_implementation": options.pop("attn_implementation", "sdpa")}
    config = AutoConfig.for_model(family, vocab_size=100, num_labels=3, pad_token_id=1, **FAMILIES[family], **options)
    return head.from_config(config, **how).eval()


def batch(*, padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(2, 100, (3, 11))
    if not padded:
        return {"input_ids": ids}
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def fused_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused steps, as they run."""
    seen: list[str] = []
    for name in ("attention", "encoder_layer_8bit"):
        real = getattr(fused, name)

        def step(*args: Any, name: str = name, real: Any = real, **options: Any) -> Tensor:
            seen.append(name)
            result: Tensor = real(*args, **options)
            return result

        monkeypatch.setattr(fused, name, step)
    return seen


FORMS = {
    "dense": lambda model: None,
    "w8a8": lambda model: pykd.quantize(model, "w8a8"),
    "w4a16": lambda model: pykd.quantize(model, "w4a16", group_size=16),
    "pruned": lambda model: pykd.prune(model, "magnitude", 0.5),
    "heads, neurons": lambda model: pykd.prune(pykd.prune(model, "heads", 0.5), "neurons", 0.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_says_stays(family: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    FORMS[form](model)
    model.eval()
    seen = fused_steps(monkeypatch)
    for inputs in (batch(), batch(padded=False)):
        with torch.inference_mode():
            want = model(**inputs).logits
            got = fuse(copy.deepcopy(model))(**inputs).logits
        rounding = {"w8a8": 2e-2}.get(form, 1e-5)  # codes at the edge between two whole numbers may take the other one
        torch.testing.assert_close(got, want, atol=rounding, rtol=rounding)
    assert seen == ["encoder_layer_8bit" if form == "w8a8" and native is not None else "attention"] * 4


def test_tags_and_token_types() -> None:
    model, inputs = model_of("bert", head=AutoModelForTokenClassification), batch()
    inputs["token_type_ids"] = torch.randint(0, 2, (3, 11))
    with torch.inference_mode():
        want = model(**inputs).logits
        torch.testing.assert_close(fuse(model)(**inputs).logits, want, atol=1e-5, rtol=1e-5)


def test_steps_aside_for_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(model_of("bert"))
    seen, inputs = fused_steps(monkeypatch), batch()
    assert model(**inputs).logits.requires_grad and not seen  # gradients
    with torch.no_grad():
        model.train()(**inputs)
        model.eval()
        assert not seen  # dropout
        model.double()(**inputs)
        assert not seen


def test_states_and_attentions_that_are_asked_for() -> None:
    model, inputs = model_of("bert", attn_implementation="eager"), batch()
    plain, fused_model = copy.deepcopy(model), fuse(model)
    for asked in ("output_hidden_states", "output_attentions"):
        with torch.no_grad():
            fused_model(**inputs)
            want, got = (each(**inputs, **{asked: True}) for each in (plain, fused_model))
        name = asked.removeprefix("output_")
        assert len(got[name]) == len(want[name]) >= 2
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)


def test_hooks_on_what_is_skipped_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = fuse(model_of("bert")), list[str]()
    seen = fused_steps(monkeypatch)
    layers = model.bert.encoder.layer
    hook = layers[0].attention.self.register_forward_hook(lambda *_: called.append("attention"))
    layers[1].register_forward_hook(lambda *_: called.append("layer"))
    layers[1].output.dense.register_forward_hook(lambda *_: called.append("dense"))
    with torch.no_grad():
        model(**batch())
        assert called == ["attention", "dense", "layer"] and seen == ["attention"]
        hook.remove()
        model(**batch())
    assert called[3:] == ["dense", "layer"] and seen == ["attention"] * 3


def test_a_hook_on_a_packed_layer_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = fuse(pykd.quantize(model_of("bert"), "w8a8").eval()), list[int]()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        model(**batch())
    assert called == [1]


def test_masks_of_queries_are_not_taken_for_masks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert")
    layer, states = model.bert.encoder.layer[0], torch.randn(2, 6, 48)
    mask = torch.ones(6, 6).tril().bool()[None, None].expand(2, 1, 6, 6)
    with torch.inference_mode():
        want = layer(states, mask)
        fuse(model)
        seen = fused_steps(monkeypatch)
        assert torch.equal(layer(states, mask), want) and not seen
        padded = torch.zeros(2, 1, 6, 6).masked_fill(torch.arange(6) > 3, torch.finfo(torch.float32).min)
        want = type(layer).forward(layer, states, padded)
        torch.testing.assert_close(layer(states, padded), want, atol=1e-5, rtol=1e-5)
    assert seen == ["attention"]


def test_saving_copying_and_quantizing_later(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("bert"), batch()
    names = list(model.state_dict())
    fuse(fuse(model))
    assert list(model.state_dict()) == names and len(list(model.modules())) == len(list(model_of("bert").modules()))
    pykd.quantize(model, "w8a8")
    model.eval()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert copied.bert.encoder.layer[0].forward.layer is copied.bert.encoder.layer[0]
    with torch.inference_mode():
        want = model(**inputs).logits
        again = fuse(pykd.from_pretrained(pykd.save_pretrained(model, tmp_path / "m")).eval())
        for other in (copied, pickled, again):
            assert torch.equal(other(**inputs).logits, want)


def test_decoders_and_foreign_layers_are_left_alone() -> None:
    class BertLayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    config = AutoConfig.for_model("bert", vocab_size=100, is_decoder=True, **FAMILIES["bert"])
    decoder = fuse(AutoModelForTokenClassification.from_config(config))
    chunked = fuse(model_of("bert", chunk_size_feed_forward=2))
    for model in (decoder, chunked, fuse(nn.Sequential(BertLayer()))):
        assert not any(isinstance(getattr(module, "forward", None), FusedForward) for module in model.modules())
