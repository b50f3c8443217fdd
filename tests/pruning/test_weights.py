"""Methods that remove single weights: what goes, in which scope, by which pattern, and how close the outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd import from_pretrained, save_pretrained
from pykd.calibration import Inputs
from pykd.errors import DataError
from pykd.nn import importance
from pykd.nn.importance import Block, Pattern
from pykd.nn.sparse_linear import SparseLinear
from pykd.pruning import prune
from pykd.pruning.random_weights import random_scores
from pykd.pruning.refit import refit
from pykd.pruning.sparsegpt import sparsegpt
from pykd.pruning.wanda import wanda


def inputs_of(rows: Tensor) -> Inputs:
    return Inputs((2 * rows.T @ rows / len(rows))[None], len(rows))


def correlated(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) @ torch.randn(columns, columns) + 0.5


def error(rows: Tensor, weight: Tensor, pruned: Tensor) -> float:
    return float((rows @ (weight - pruned).T).square().mean())


# Pure functions.


def test_wanda_weighs_by_the_norm_of_each_input_of_each_block() -> None:
    rows = [correlated(40, 6), correlated(40, 6)]
    inputs = Inputs(torch.cat([inputs_of(x).hessian for x in rows]), 80)
    weight = torch.randn(10, 6)
    want = torch.cat([weight[:5].abs() * rows[0].norm(dim=0), weight[5:].abs() * rows[1].norm(dim=0)])
    torch.testing.assert_close(wanda(weight, inputs), want * (2 / 40) ** 0.5)
    with pytest.raises(ValueError, match=r"a hessian \[blocks, 7, 7\] whose blocks divide 10 outputs"):
        wanda(torch.randn(10, 7), inputs)


def test_sparsegpt_is_exact_where_a_combination_of_inputs_can_replace_the_weight() -> None:
    """Inputs 4..7 repeat 0..3, so that the outputs need only half of the weights."""
    half = torch.randn(100, 4)
    rows, weight = torch.cat([half, half], dim=1), torch.randn(3, 8)
    found, mask = sparsegpt(weight, inputs_of(rows), sparsity=0.5, damping=1e-6)
    assert int(mask.sum()) == 12 and bool((found[~mask] == 0).all())
    by_size = weight * (weight.abs() > weight.abs().flatten().kthvalue(12).values)
    assert error(rows, weight, found) < 0.6 * error(rows, weight, by_size)


@pytest.mark.parametrize(("columns", "pattern"), [(300, None), (37, None), (136, Pattern(2, 4)), (24, Pattern(1, 4))])
def test_sparsegpt_beats_what_it_begins_with(columns: int, pattern: Pattern | None) -> None:
    rows, weight = correlated(600, columns), torch.randn(50, columns)
    sparsity = 0.5 if pattern is None else pattern.sparsity
    inputs = inputs_of(rows)
    errors = []
    for refits in (0, 8, 32):
        found, mask = sparsegpt(weight, inputs, sparsity=sparsity, pattern=pattern, refits=refits)
        assert bool((found[~mask] == 0).all())
        errors.append(error(rows, weight, found))
    if pattern is None:
        assert int((~mask).sum()) == sum(round(0.5 * 50 * min(128, columns - a)) for a in range(0, columns, 128))
        rival = importance.mask_of_rows(wanda(weight, inputs), 0.5)
    else:
        assert bool((mask.view(50, -1, 4).sum(2) == pattern.kept).all())
        rival = importance.mask_of_pattern(wanda(weight, inputs), pattern)
    assert errors[2] <= errors[1] < errors[0]
    assert errors[2] < 0.8 * error(rows, weight, weight * rival)


def test_refit_is_least_squares() -> None:
    rows, target = correlated(200, 12).double(), torch.randn(1, 5, 12).double()
    hessian = inputs_of(rows).hessian
    mask = torch.rand(1, 5, 12) < 0.5
    found = refit(target, target * mask, mask, hessian, steps=60)
    for row in range(5):
        kept = mask[0, row]
        want = torch.linalg.lstsq(rows[:, kept], rows @ target[0, row]).solution
        torch.testing.assert_close(found[0, row, kept], want, rtol=1e-4, atol=1e-4)
    assert bool((found[~mask] == 0).all())


def test_sparsegpt_keeps_zeros_and_refuses_nonsense() -> None:
    inputs, weight = inputs_of(correlated(50, 8)), torch.randn(6, 8)
    weight[:, 2:5] = 0
    found, mask = sparsegpt(weight, inputs, sparsity=0.25)
    assert not bool(mask[:, 2:5].any()) and bool((found[:, 2:5] == 0).all())
    for wrong in ({"damping": 0.0}, {"refits": -1}, {"block": 0}, {"pattern": Pattern(1, 3)}):
        with pytest.raises(ValueError, match="damping must be above 0, refits at least 0 and block at least 1"):
            sparsegpt(weight, inputs, sparsity=0.5, **wrong)


def test_random_scores_differ_by_seed_alone() -> None:
    weight = torch.ones(3, 5)
    assert torch.equal(random_scores(weight, seed=4), random_scores(2 * weight, seed=4))
    assert not torch.equal(random_scores(weight, seed=4), random_scores(weight, seed=5))


def test_patterns_by_name() -> None:
    assert importance.pattern_of("2:4") == Pattern(2, 4) and Pattern(1, 4).sparsity == 0.75
    assert importance.pattern_of("4x1") == Block(4, 1)
    for wrong in ("4:4", "0:4", "2-4", 24, "1x1", "0x4"):
        with pytest.raises(ValueError, match="pattern is N:M, N weights kept of M neighbours, as '2:4' or '1:4', or"):
            importance.pattern_of(wrong)
    with pytest.raises(ValueError, match="a pattern of 4 neighbours divides no row of 6 inputs"):
        importance.mask_of_pattern(torch.ones(2, 6), Pattern(2, 4))


# On models.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5)
    )


def images() -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(n))} for n in range(3)]


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
def test_every_method_prunes_saves_and_reloads(method: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **shape)).eval()
    texts = [{"input_ids": torch.randint(3, 50, (8, 9)), "attention_mask": torch.ones(8, 9)} for _ in range(3)]
    prune(model, method, 0.6, data=texts)
    entry = model.pykd_report[-1]
    assert len(entry["changed"]) == 12 and entry["skipped"]["bert.pooler.dense"] == "outside the transformer's layers"
    total = sum(model.get_submodule(name).weight.numel() for name in entry["changed"])
    gone = sum(int((model.get_submodule(name).weight == 0).sum()) for name in entry["changed"])
    assert abs(gone / total - 0.6) < 0.01
    with torch.no_grad():
        want = model(**texts[0]).logits
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(**texts[0]).logits, want)


@pytest.mark.parametrize(("method", "scope"), [("magnitude", "layer"), ("random", "layer"), ("wanda", "layer")])
def test_each_layer_meets_the_share(method: str, scope: str) -> None:
    model = prune(network(), method, 0.25, scope=scope, data=images())
    for index in (0, 3):
        weight = model[index].weight
        assert int((weight == 0).sum()) == round(0.25 * weight.numel())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_each_output_meets_the_share(method: str) -> None:
    model = prune(network(), method, 0.25, scope="row", data=images())
    for index in (0, 3):
        matrix = model[index].weight.flatten(1)
        assert (matrix == 0).sum(1).tolist() == [round(0.25 * matrix.shape[1])] * len(matrix)


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_patterns_hold_in_every_layer(method: str, pattern: str) -> None:
    model = prune(network(), method, pattern=pattern, data=images())
    kept = int(pattern[0])
    weight = model[3].weight
    assert isinstance(model[3], SparseLinear) and bool(((weight != 0).view(32, -1, 4).sum(2) == kept).all())
    entry = model.pykd_report[-1]
    assert entry["parameters"]["sparsity"] == 1 - kept / 4 and entry["parameters"]["pattern"] == pattern
    assert entry["skipped"]["0"] == "its 18 inputs are no multiple of 4"


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["4x1", "16x16", "5x3"])
def test_blocks_go_whole(method: str, pattern: str) -> None:
    if method == "sparsegpt" and pattern == "5x3":
        with pytest.raises(ValueError, match="block at least 1 and a multiple of the pattern's width"):
            prune(network(), method, pattern=pattern, data=images())
        return
    model = prune(network(), method, 0.25, pattern=pattern, data=images(), include=["3"])
    block = importance.pattern_of(pattern)
    assert isinstance(block, Block) and isinstance(model[3], SparseLinear)
    small = importance.pooled((model[3].weight != 0).float(), block)
    assert set(small.flatten().tolist()) <= {0, 1}
    if method != "wanda":
        assert int((small == 0).sum()) == round(0.25 * small.numel())
    again = importance.unpooled(small.bool(), block, model[3].weight.shape)
    assert torch.equal(again, model[3].weight != 0)
    assert "x" in model[3].format or pattern == "5x3"


def test_outputs_stay_closer_the_more_a_method_knows() -> None:
    batches, errors = images(), {}
    with torch.no_grad():
        want = network()(batches[0]["pixel_values"])
        for method in ("random", "magnitude", "sparsegpt"):
            model = prune(network(), method, 0.5, scope="layer", data=batches)
            errors[method] = float((model(batches[0]["pixel_values"]) - want).norm())
    assert errors["sparsegpt"] < 0.9 * errors["magnitude"] < 0.9 * errors["random"]


def test_layers_without_examples_are_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.idle(x) if x.sum() > 1e9 else self.used(x))
            return scores

    model = prune(Gated(), "wanda", data=[torch.randn(8, 8)])
    entry = model.pykd_report[0]
    assert list(entry["changed"]) == ["used"] and entry["skipped"]["idle"].startswith("the examples never reached it")
    with pytest.raises(ValueError, match="the examples reached none of 1 layers: give data="):
        prune(Gated(), "wanda", data=[torch.randn(8, 8)], include=["idle"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "sparsegtp"}, "unknown method 'sparsegtp': did you mean 'sparsegpt'"),
    ({"method": "movement"}, r"learns what goes while the model trains: .*prune=Gradual\(method='movement'\)"),
    ({"scope": "layers"}, r"unknown scope 'layers': did you mean 'layer'.*\(method 'magnitude'\)"),
    ({"method": "wanda", "scope": "global"}, r"unknown scope 'global': Known: layer, row. \(method 'wanda'\)"),
    ({"method": "heads", "scope": "layer"}, "scope says over which single weights the share is met: it goes with"),
    ({"method": "heads", "importance": "l3"}, "unknown importance 'l3': Known: activation, l1, l2"),
    ({"importance": "l1"}, "importance scores whole units: it goes with method 'channels', 'heads', 'neurons', not"),
    ({"method": "layers", "pattern": "2:4"}, "pattern says which single weights go together: it goes with method"),
    ({"pattern": "2:4", "sparsity": 0.7}, "pattern '2:4' removes 0.5 of the weights: leave"),
    ({"pattern": "4:2"}, "pattern is N:M"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_does_not_go_together(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        prune(network(), **options)


def test_data_is_asked_for() -> None:
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(DataError, match=f"method='{method}' looks at examples: pass data="):
            prune(network(), method)
    with pytest.raises(ValueError, match=r"no layer of Sequential is left to prune \(0: its 18 inputs are no multiple"):
        prune(network(), pattern="2:4", include=["0"])


# What families lose by default.


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**COMMON))


COMMON: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30,
}  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {name: value for name, value in COMMON.items() if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=30))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=1, pad_token_id=0))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, bos_token_id=1, eos_token_id=2))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=30)
    )


def camembert() -> nn.Module:
    from transformers import CamembertConfig, CamembertForSequenceClassification

    return CamembertForSequenceClassification(CamembertConfig(**COMMON, pad_token_id=1))


def deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    config = DeepseekV3Config(**COMMON, **ranks, **experts, first_k_dense_replace=1, num_key_value_heads=2)
    return DeepseekV3ForCausalLM(config)


#: The encoder layer of BERT and its kin.
ENCODER = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"} | {
    "intermediate.dense",
    "output.dense",
}
#: Family -> the layers that lose weights, without the stack's name, and those that are named as left alone.
LOSES: dict[Callable[[], nn.Module], tuple[set[str], set[str]]] = {
    bert: (ENCODER, {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
    camembert: (ENCODER, {"classifier.dense", "classifier.out_proj"}),
    distilbert: (
        {f"attention.{x}_lin" for x in ("q", "k", "v", "out")} | {"ffn.lin1", "ffn.lin2"},
        {"pre_classifier", "classifier"},
    ),
    deepseek: (
        {f"self_attn.{x}" for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
        | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        {"lm_head"},
    ),
    vit: (
        {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"},
        {"vit.embeddings.patch_embeddings.projection", "classifier"},
    ),
    t5: (
        {f"layer.{i}.{kind}Attention.{x}" for i, kind in ((0, "Self"), (1, "EncDec")) for x in "qkvo"}
        | {f"layer.{i}.DenseReluDense.{x}" for i in (1, 2) for x in ("wi", "wo")},
        {"lm_head"},
    ),
    llama: (
        {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        {"lm_head"},
    ),
    gpt2: ({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}, {"lm_head"}),
}


@pytest.mark.parametrize("build", LOSES, ids=lambda build: build.__name__)
def test_defaults_are_attention_and_feed_forward(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch: dict[str, Tensor] = {"input_ids": torch.arange(3, 15).view(2, 6)}
    if build is vit:
        batch = {"pixel_values": torch.ones(1, 3, 8, 8)}
    batch |= {"decoder_input_ids": batch["input_ids"]} if build is t5 else {}
    prune(model, sparsity=0.5)
    entry, (loses, left) = model.pykd_report[0], LOSES[build]
    names = {name.partition(".0.")[2] for name in entry["changed"]}
    assert names == loses and left <= set(entry["skipped"])
    for name, parameter in model.named_parameters():
        if name in before and parameter.shape == before[name].shape:
            assert torch.equal(parameter, before[name])
    with torch.no_grad():
        want = model(**batch).logits
        save_pretrained(model, tmp_path / "model")
        assert torch.equal(from_pretrained(tmp_path / "model").eval()(**batch).logits, want)


def test_patch_embeddings_of_torchvision_stay() -> None:
    """Its transformers lose feed-forward weights: nn.MultiheadAttention reads those of attention itself."""
    from torchvision.models import VisionTransformer

    shape = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    model = prune(VisionTransformer(**shape, num_classes=3))
    entry: Any = model.pykd_report[0]
    assert list(entry["changed"]) == [f"encoder.layers.encoder_layer_0.mlp.{index}" for index in (0, 3)]
    assert entry["skipped"]["conv_proj"] == "embeds the patches of a transformer"
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert entry["skipped"][attention] == "no sparse form of MultiheadAttention"


def test_experts_in_one_tensor_are_named() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = prune(MixtralForCausalLM(MixtralConfig(**COMMON, num_key_value_heads=1, num_local_experts=2)))
    entry: Any = model.pykd_report[0]
    assert {name.rpartition(".")[2] for name in entry["changed"]} == {f"{x}_proj" for x in "qkvo"}
    assert entry["skipped"]["model.layers.0.mlp.experts"] == "no sparse form of MixtralExperts"
