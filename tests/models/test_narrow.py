"""Narrower and shallower students of every family: what they keep, that it fits together, and that it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pykd
from pykd.models.adapter import logits
from pykd.models.huggingface import load_huggingface
from pykd.models.layer_choice import block_influence, choose_layers, skip_divergence
from pykd.models.layers import keep_layers, layer_map
from pykd.models.sizes import PRESETS, heads_that_divide, preset_config, resized_config, size_of
from pykd.models.students import derive

BODY = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 40}
T5 = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 4, "num_heads": 6,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 60, "d_model": 48, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
          "n_shared_experts": 1, "first_k_dense_replace": 2, "num_key_value_heads": 6}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("masked-lm", BODY),
    "camembert": ("token-classification", BODY),
    "distilbert": ("masked-lm", {"vocab_size": 60, "dim": 48, "n_layers": 4, "n_heads": 6, "hidden_dim": 40}),
    "vit": ("image-classification", {**BODY, "image_size": 16, "patch_size": 8}),
    "t5": ("seq2seq-lm", T5),
    "bart": ("seq2seq-lm", BART),
    "llama": ("causal-lm", {**BODY, "num_key_value_heads": 3}),
    "qwen3": ("causal-lm", {**BODY, "num_key_value_heads": 2, "head_dim": 12}),
    "deepseek_v3": ("causal-lm", {**BODY, **LATENT}),
}
TOKENS = torch.arange(6, 18).view(2, 6)


def teacher(family: str) -> nn.Module:
    task, config = FAMILIES[family]
    if family == "vit":
        config = {name: value for name, value in config.items() if name != "vocab_size"}
    torch.manual_seed(0)
    return load_huggingface(None, task, config={"model_type": family, **config}).eval()


def batch(family: str) -> dict[str, Tensor]:
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}


def scores(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_configuration_describes_the_student(family: str, tmp_path: Path) -> None:
    model, inputs = teacher(family), batch(family)
    student = derive(model, hidden_size=32, depth=2)
    (entry,) = student.pykd_report
    assert entry["parameters_after"] < 0.7 * entry["parameters_before"]
    want = scores(student, inputs)
    pykd.save_pretrained(student, tmp_path / "student")
    plain = type(student).from_pretrained(tmp_path / "student")  # type: ignore[operator]
    assert torch.equal(scores(plain, inputs), want) and not hasattr(plain.config, "quantization_config")
    assert layer_map(plain) == layer_map(student) == {name: [0, 3] for name in layer_map(model)}
    whole = derive(model, hidden_size=48)
    assert torch.equal(scores(whole, inputs), scores(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_do_nothing_go_first(family: str) -> None:
    """By weights, and for Llama by activations: channels that nothing reads or writes are the ones that go."""
    model, inputs = teacher(family), batch(family)
    silent = [0, 7, 20, 21, 33, 40, 41, 47]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            norm = "norm" in name.lower() and tensor.dim() == 1
            for axis in range(tensor.dim()):
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                if tensor.shape[axis] == 48 and (axis or writes or tensor.dim() == 1) and not norm:
                    tensor.index_fill_(axis, torch.tensor(silent), 0.0)
    channels = [channel for channel in range(48) if channel not in silent]
    options: dict[str, Any] = {"hidden_size": 40} | ({"batches": [inputs]} if family == "llama" else {})
    student = derive(model, **options)
    table = next(name for name, tensor in model.state_dict().items() if tensor.dim() > 1 and 48 in tensor.shape[-1:])
    if family != "vit":
        kept, original = student.state_dict()[table], model.state_dict()[table]
        assert torch.equal(kept, original[..., channels])


def test_the_same_heads_with_fewer_channels_keep_their_scores() -> None:
    model = teacher("bert")
    layer = model.bert.encoder.layer[0].attention.self
    strong = torch.tensor([[head * 8 + channel for channel in (1, 2, 4, 7)] for head in range(6)]).flatten()
    weak = torch.tensor([row for row in range(48) if row not in strong.tolist()])
    with torch.no_grad():
        for each in model.bert.encoder.layer:
            for projection in (each.attention.self.query, each.attention.self.key):
                projection.weight[weak] = 0
    student = derive(model, hidden_size=24)
    mine = student.bert.encoder.layer[0].attention.self
    assert mine.attention_head_size == 4 and mine.num_attention_heads == 6
    kept = torch.tensor([c for c in range(48) if c in columns(model, student)])
    assert torch.equal(mine.key.weight, layer.key.weight[strong][:, kept])
    torch.testing.assert_close(mine.query.weight, layer.query.weight[strong][:, kept] * 0.5**0.5)


def columns(model: nn.Module, student: nn.Module) -> list[int]:
    its, mine = (m.get_input_embeddings().weight for m in (model, student))
    return [c for c in range(its.shape[1]) if any(torch.equal(its[:, c], mine[:, k]) for k in range(mine.shape[1]))]


def test_grouped_heads_keep_their_groups() -> None:
    model = teacher("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[16:32] *= 4  # query heads 2 and 3, which share key head 1
    student = derive(model, heads=2)
    mine = student.model.layers[0].self_attn
    assert (student.config.num_attention_heads, student.config.num_key_value_heads, student.config.head_dim) == (
        2,
        1,
        8,
    )
    assert torch.equal(mine.k_proj.weight, attention.k_proj.weight[8:16])
    assert torch.equal(mine.q_proj.weight, attention.q_proj.weight[16:32])


def test_t5_keeps_the_same_heads_in_every_layer_that_shares_position_biases() -> None:
    model = teacher("t5")
    student = derive(model, heads=3, layers=[2, 3])
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    its, mine = model.state_dict()[bias], student.state_dict()[bias]
    heads = [h for h in range(6) if any(torch.equal(its[:, h], mine[:, k]) for k in range(3))]
    assert len(heads) == 3
    rows = torch.tensor([head * 8 + c for head in heads for c in range(8)])
    for new, old in enumerate((2, 3)):
        name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
        assert torch.equal(student.state_dict()[name.format(new)], model.state_dict()[name.format(old)][rows])


# Which layers.


def test_layers_that_do_nothing_are_found() -> None:
    model, inputs = teacher("llama"), batch("llama")
    with torch.no_grad():
        for index in (1, 2):
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for measure in (block_influence, skip_divergence):
        found = measure(model, [inputs])["model.layers"]
        assert found[[1, 2]].abs().max() < 1e-6 and found[[0, 3]].min() > 1e-6
    for how in ("influence", "divergence"):
        student = derive(model, depth=2, layers=how, batches=[inputs])
        assert layer_map(student) == {"model.layers": [0, 3]}
        torch.testing.assert_close(scores(student, inputs), scores(model, inputs))


def test_influence_is_the_mean_cosine_distance() -> None:
    model, inputs = teacher("bert"), batch("bert")
    inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        states = model(
            input_ids=TOKENS, attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states
    real = inputs["attention_mask"].bool()
    want = [1 - torch.cosine_similarity(states[i], states[i + 1], dim=-1)[real].mean().item() for i in range(4)]
    assert block_influence(model, [inputs])["bert.encoder.layer"].tolist() == pytest.approx(want, abs=1e-6)


def test_divergence_is_that_of_the_outputs_without_the_layer() -> None:
    model, inputs = teacher("bert"), batch("bert")
    without = derive(model, layers=[0, 1, 3])
    p, q = (scores(m, inputs).flatten(0, 1).log_softmax(-1) for m in (model, without))
    want = (p.exp() * (p - q)).sum(1).mean().item()
    assert skip_divergence(model, [inputs])["bert.encoder.layer"][2].item() == pytest.approx(want, rel=1e-4)
    assert len(model.bert.encoder.layer) == 4 and not model.training


def test_maps_name_the_first_teacher() -> None:
    first = derive(teacher("bert"), layers=[0, 1, 3])
    second = derive(first, depth=2)
    assert layer_map(second) == {"bert.encoder.layer": [0, 3]} and layer_map(first) == {"bert.encoder.layer": [0, 1, 3]}
    keep_layers(first, {"bert.encoder.layer": [1, 2]})
    assert layer_map(first) == {"bert.encoder.layer": [1, 3]} and first.config.num_hidden_layers == 2
    for how, want in (("first", [0, 1]), ("last", [2, 3])):
        assert choose_layers(teacher("bert"), 2, how) == {"bert.encoder.layer": want}


def test_encoder_and_decoder_of_different_depth() -> None:
    student = derive(teacher("t5"), layers={"encoder.block": [0, 1, 3], "decoder.block": [1]})
    assert (student.config.num_layers, student.config.num_decoder_layers) == (3, 1)
    again = type(student)(student.config).eval()
    again.load_state_dict(student.state_dict())
    assert torch.equal(scores(again, batch("t5")), scores(student, batch("t5")))


# Sizes.


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "llama", "vit"])
def test_published_sizes_from_scratch(preset: str, family: str) -> None:
    size, vocabulary = PRESETS[preset], {} if family == "vit" else {"vocab_size": 32000}
    config = preset_config(preset, family, **vocabulary)
    with torch.device("meta"):
        model = load_huggingface(None, FAMILIES[family][0], config=config)
    assert [len(stack) for stack in layer_map(model).values()] in ([size.depth], [size.depth] * 2)
    assert model.config.hidden_size == size.hidden_size and model.config.num_attention_heads == size.heads


def test_published_sizes_from_a_teacher_with_32000_tokens(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    base = load_huggingface(None, "masked-lm", config=preset_config("12x768", "bert", vocab_size=32000))
    student = derive(base, preset="6x512")
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 512, 8)
    assert config.intermediate_size == 2048 and student.get_input_embeddings().weight.shape == (32000, 512)
    assert layer_map(student) == {"bert.encoder.layer": [0, 2, 4, 7, 9, 11]} and not caplog.records
    assert student.pykd_report[0]["parameters"]["preset"] == "6x512"
    smaller = derive(student, preset="2x384")
    assert smaller.config.num_attention_heads == 8 and layer_map(smaller) == {"bert.encoder.layer": [0, 11]}
    asked = derive(student, hidden_size=300, depth=1)
    (entry,) = asked.pykd_report
    assert entry["notes"] == ["6 attention heads instead of 8: 8 do not divide the width 300"]
    assert entry["notes"][0] in caplog.text


def test_other_sizes_say_what_they_do_about_heads(caplog: pytest.LogCaptureFixture) -> None:
    student = derive(
        load_huggingface(None, "masked-lm", config=preset_config("2x96", "bert", vocab_size=9)), preset="1x40"
    )
    said = "10 attention heads instead of 12: 12 do not divide the width 40"
    assert student.config.num_attention_heads == 10 and student.pykd_report[0]["notes"] == [said]
    assert caplog.messages == [said]
    assert preset_config("1x40", "bert")["num_attention_heads"] == 10 and caplog.messages == [said] * 2
    assert preset_config("1x40", "bert", num_attention_heads=8)["num_attention_heads"] == 8
    assert preset_config("6x512", "bert")["num_attention_heads"] == 8 and len(caplog.messages) == 2


def test_head_counts() -> None:
    assert [heads_that_divide(width, 12) for width in (768, 512, 312, 384, 7)] == [12, 8, 12, 12, 7]
    assert size_of("3x256").heads == 8
    with pytest.raises(ValueError, match=r"unknown preset '6-512'.* Or any other layers x width, as 3x256"):
        size_of("6-512")
    llama = teacher("llama").config
    for wanted, found in ((5, (4, 2)), (4, (4, 2)), (3, (3, 3)), (1, (1, 1))):  # two query heads share a key head
        new, notes = resized_config(llama, hidden_size=None, heads=wanted, intermediate_size=None)
        assert (new.num_attention_heads, new.num_key_value_heads) == found
        assert bool(notes) == (found[0] != wanted)


# What cannot be made.


def test_what_cannot_be_cut() -> None:
    model = teacher("bert")
    for options, message in [
        ({"preset": "2x24", "depth": 1}, "preset '2x24' says every size"),
        ({"layers": [0, 1], "depth": 2}, "layers names the layers kept: leave depth out"),
        ({"layers": [1, 0]}, r"layers of bert.encoder.layer are some of 0..3 in ascending order, got \[1, 0\]"),
        ({"layers": [0, 4]}, "some of 0..3"),
        ({"layers": {"encoder": [0]}}, "has no stack of layers 'encoder', only bert.encoder.layer"),
        ({"depth": 2, "layers": "best"}, "unknown choice of layers 'best'"),
        ({"depth": 2, "layers": "influence"}, "layers='influence' is measured on data: pass batches"),
        ({"hidden_size": 64}, "hidden_size must be between 1 and the teacher's 48, got 64"),
        ({"heads": 7}, "heads must be between 1 and the teacher's 6, got 7"),
        ({"intermediate_size": 0}, "intermediate_size must be between 1 and the teacher's 40, got 0"),
        ({"heads": 2}, "2 heads of 24 channels cannot be cut from the teacher's 6 of 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            derive(model, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_size, heads and intermediate_size need a Hugging Face transformer"):
        derive(nn.Sequential(nn.Linear(2, 2)), hidden_size=1)
    with pytest.raises(ValueError, match="layers needs a transformer; Sequential has no stack"):
        derive(nn.Sequential(nn.Linear(2, 2)), layers=[0])
    with pytest.raises(ValueError, match="the heads of 'deepseek_v3' share a latent code and stay"):
        derive(teacher("deepseek_v3"), heads=2)
    with pytest.raises(ValueError, match="of the teacher has another shape than its configuration says"):
        derive(derive(model, width=0.5), hidden_size=24)
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=9, n_positions=8))
    with pytest.raises(ValueError, match="the configuration of 'gpt2' does not tell its width: use width= or depth="):
        derive(gpt2, hidden_size=12)
