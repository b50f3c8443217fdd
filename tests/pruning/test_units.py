"""Whole units removed from tiny real architectures: what falls, what the config says, reloading, and training on."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pykd import prune, save_pretrained
from pykd.errors import DataError
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn import slicing
from pykd.nn.bound_heads import bound_blocks
from pykd.pruning.measured import activations, taylor
from pykd.training import Guard
from pykd.training.finetune import label_loss
from pykd.training.guarded import guarded_change

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {**SHAPE, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

#: Family -> task, config.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("sequence-classification", {"model_type": "bert", **TEXT}),
    "distilbert": (
        "sequence-classification",
        {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50},
    ),
    "camembert": ("sequence-classification", {"model_type": "camembert", **TEXT}),
    "mpnet": ("sequence-classification", {"model_type": "mpnet", **TEXT}),
    "t5": (
        "seq2seq-lm",
        {"model_type": "t5", "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 50}
        | {"decoder_start_token_id": 0},
    ),
    "llama": ("causal-lm", {"model_type": "llama", **TEXT, "num_key_value_heads": 2}),
    "gpt2": (
        "causal-lm",
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 50}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "deepseek": (
        "causal-lm",
        {"model_type": "deepseek_v3", **TEXT, **MLA, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    ),
    "vit": ("image-classification", {"model_type": "vit", **SHAPE, "image_size": 16, "patch_size": 4}),
}
NETWORKS = ("resnet18", "mobilenet_v2")
FAMILIES = (*NETWORKS, *CONFIGS)
#: Families whose heads are not removed: query, key and value come from projections in two steps, through low ranks.
NO_HEADS = ("deepseek",)


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family in NETWORKS:
        return load_torchvision(family, num_classes=5).eval()
    task, config = CONFIGS[family]
    labels = {} if task.endswith("-lm") else {"num_labels": 5}
    return load_huggingface(None, task, config=config, **labels).eval()


def batches(family: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if family in NETWORKS or family == "vit":
        size = 16 if family == "vit" else 32
        images = torch.randn(8, 3, size, size, generator=generator)
        return [{"pixel_values": part, "labels": torch.arange(4) % 5} for part in images.split(4)]
    tokens = torch.randint(3, 50, (8, 7), generator=generator)
    per_position = CONFIGS[family][0] in ("causal-lm", "seq2seq-lm")
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part if per_position else part[:, 0] % 5}
        for part in tokens.split(4)
    ]


def methods(family: str) -> list[str]:
    if family in NETWORKS:
        return ["channels"]
    return ["neurons"] if family in NO_HEADS else ["heads", "neurons"]


def scores_of(model: nn.Module, family: str) -> Tensor:
    from pykd.models.adapter import logits

    with torch.no_grad():
        return logits(model.eval(), batches(family)[0])


def flops(model: nn.Module, family: str) -> int:
    with FlopCounterMode(display=False) as counter:
        scores_of(model, family)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path, Tensor]]:
    """Every family at half its units, and saved."""
    folder, found = tmp_path_factory.mktemp("units"), {}
    for family, importance in zip(FAMILIES, ["l2", "taylor", "activation", "l1"] * 3, strict=False):
        model = build(family)
        for method in methods(family):
            prune(model, method, 0.5, importance=importance, data=batches(family), example=batches(family)[0])
        save_pretrained(model, folder / family)
        found[family] = model, folder / family, scores_of(model, family)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_operations_and_bytes_fall(family: str, pruned: dict[str, Any], tmp_path: Path) -> None:
    before, (model, folder, _) = build(family), pruned[family]
    saved = save_pretrained(before, tmp_path / "before")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (before, model)]
    stored = [(path / "model.safetensors").stat().st_size for path in (saved, folder)]
    counted = [flops(m, family) for m in (before, model)]
    for values in (sizes, stored, counted):
        assert values[1] < 0.9 * values[0], (sizes, stored, counted)
    entry = model.pykd_report[0]
    assert entry["parameters_before"] == sizes[0] and all(after < now for now, after in entry["changed"].values())


#: Family -> what its config says afterwards, where a config of the family can say it.
SAYS: dict[str, dict[str, int]] = {
    "bert": {"intermediate_size": 24},
    "camembert": {"intermediate_size": 24},
    "mpnet": {"intermediate_size": 24},
    "distilbert": {"hidden_dim": 24},
    "t5": {"d_ff": 24, "num_heads": 2},
    "llama": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_inner": 24},
    "deepseek": {"intermediate_size": 24},
    "vit": {"intermediate_size": 24},
}


@pytest.mark.parametrize("family", SAYS)
def test_the_config_says_what_it_can(family: str, pruned: dict[str, Any]) -> None:
    model, folder, _ = pruned[family]
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in SAYS[family]} == SAYS[family]
    for block in (*slicing.attention_blocks(model), *bound_blocks(model)):
        assert block.units == (1 if family == "llama" else 2) and block.heads == 2


RELOAD = """
import sys, torch, pykd
from pathlib import Path
from safetensors.torch import load_file
from pykd.models.adapter import logits
for folder in map(Path, sys.argv[1:]):
    data = load_file(folder.with_suffix(".batch"))
    want = data.pop("want")
    with torch.no_grad():
        got = logits(pykd.from_pretrained(folder).eval(), data)
    print(folder.name, torch.equal(got, want))
"""


def test_a_new_process_computes_the_same_bits(pruned: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    for family, (_, folder, want) in pruned.items():
        batch = {name: tensor.contiguous().clone() for name, tensor in batches(family)[0].items()}
        save_file({**batch, "want": want.contiguous()}, folder.with_suffix(".batch"))
    words = [sys.executable, "-c", RELOAD, *(str(folder) for _, folder, _ in pruned.values())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for family in pruned for word in (family, "True")]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_on(family: str, pruned: dict[str, Any]) -> None:
    from pykd import from_pretrained
    from pykd.models.adapter import num_classes

    model = from_pretrained(pruned[family][1]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = label_loss(model, batches(family)[0], classes=num_classes(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    assert losses[-1] < losses[0]


# Scores.


class Toy(nn.Module):
    """One feed-forward block and a head, small enough to remove each neuron and look."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.lin2(self.lin1(x).relu())
        return scores


def toy_batches() -> list[dict[str, Tensor]]:
    return [{"pixel_values": torch.randn(16, 5), "labels": torch.randint(4, (16,))} for _ in range(3)]


def test_taylor_is_the_slope_of_the_loss_in_each_gate() -> None:
    model, data = Toy(), toy_batches()
    gates = {model.lin2: lambda product: product.sum(0)}
    found = taylor(model, gates, data)[model.lin2]
    for neuron in range(6):
        slopes = []
        for batch in data:
            gate = torch.ones(6, requires_grad=True)
            hidden = model.lin1(batch["pixel_values"]).relu() * gate
            loss = nn.functional.cross_entropy(model.lin2(hidden), batch["labels"])
            (slope,) = torch.autograd.grad(loss, gate)
            slopes.append(slope[neuron] ** 2)
        torch.testing.assert_close(found[neuron], torch.stack(slopes).mean())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_are_means_without_padding() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.layer(input_ids)
            return out

    found = activations(Text(), [layer], [{"input_ids": x, "attention_mask": mask}])
    torch.testing.assert_close(found[layer], x[mask.bool()].abs().mean(0))
    conv, images = nn.Conv2d(3, 2, 1), torch.randn(2, 3, 5, 5)
    found = activations(nn.Sequential(conv), [conv], [{"pixel_values": images}])
    torch.testing.assert_close(found[conv], images.abs().mean((0, 2, 3)))
    with pytest.raises(ValueError, match="the examples reach none of the layers that are to be pruned"):
        activations(Text(), [nn.Linear(2, 2)], [{"input_ids": x, "attention_mask": mask}])


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "resnet18"])
def test_units_that_do_nothing_go_first(family: str, importance: str) -> None:
    """With half of the units silenced, removing half of them changes no output, whatever the score."""
    model = build(family)
    silence: Callable[[nn.Module], None] = silence_channels if family == "resnet18" else silence_heads
    if family == "gpt2":
        prune(model, "heads", 0.0)  # plain linear layers
    silence(model)
    want = scores_of(model, family)
    method = "channels" if family == "resnet18" else "heads"
    options: dict[str, Any] = {"include": ["layer1.0.conv1"]} if family == "resnet18" else {}
    prune(model, method, 0.5, importance=importance, data=batches(family), example=batches(family)[0], **options)
    torch.testing.assert_close(scores_of(model, family), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def silence_heads(model: nn.Module) -> None:
    """The first half of the units of each block: values and what reads them are zero, queries and keys small."""
    for block in (*slicing.attention_blocks(model), *bound_blocks(model)):
        half = block.output.in_features // 2
        block.output.weight[:, :half] = 0
        parts = 3 if block.fused else 1
        for layer in block.projections:
            rows = layer.weight.view(parts, -1, layer.in_features)
            rows[:, : rows.shape[1] // 2] *= 0 if layer is block.value and not block.fused else 0.01
            if block.fused:
                rows[2, : rows.shape[1] // 2] = 0
                layer.bias.view(3, -1)[2, : rows.shape[1] // 2] = 0
            elif layer is block.value and layer.bias is not None:
                layer.bias[: len(layer.bias) // 2] = 0


@torch.no_grad()
def silence_channels(model: nn.Module) -> None:
    block: Any = model.get_submodule("layer1.0")
    for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
        tensor[::2] = 0
    block.conv2.weight[:, ::2] = 0


def test_blocks_that_share_a_bias_lose_the_same_heads() -> None:
    model: Any = build("t5")
    before = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach().clone()
    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.o.weight[:, 8:24] *= (
            10  # heads 1 and 2 matter, by the second block
        )
    prune(model, "heads", 0.5, include=["encoder"])
    first = model.encoder.block[0].layer[0].SelfAttention
    assert torch.equal(first.relative_attention_bias.weight, before[:, 1:3]) and first.n_heads == 2
    assert list(model.pykd_report[0]["changed"]) == [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    assert model.config.num_heads == 4 and scores_of(model, "t5").isfinite().all()
    model = prune(build("t5"), "heads", 0.5, exclude=["decoder.block.1.layer.0"])
    skipped = model.pykd_report[0]["skipped"]
    assert skipped == {
        f"decoder.block.{i}.layer.0.SelfAttention": "excluded by 'decoder.block.1.layer.0'" for i in (0, 1)
    }
    assert len(model.pykd_report[0]["changed"]) == 4


@pytest.mark.parametrize(
    ("name", "method", "harmed"),
    [
        ("t5", "heads", "decoder.block.1.layer.0.SelfAttention.q"),
        ("resnet18", "channels", "layer2.1.conv2"),
    ],
)
def test_a_guard_leaves_alone_what_loses_its_units_together(name: str, method: str, harmed: str) -> None:
    model = build(name)
    whole = len(model.get_submodule(harmed).weight)
    few = {"include": ["layer1.*.conv1", "layer2"]} if method == "channels" else {}

    def validate(changed: nn.Module) -> dict[str, float]:
        return {"accuracy": len(changed.get_submodule(harmed).weight) / whole}

    def change(model: nn.Module, exclude: Sequence[str]) -> nn.Module:
        return prune(model, method, 0.5, exclude=list(exclude) or None, **few)

    found = guarded_change(model, change, validate, Guard())
    entry = found.pykd_report[-1]
    (left,) = [unit for unit in prune(copy.deepcopy(model), method, 0.5, **few).pykd_report[0]["units"]
               if any(harmed.startswith(each) for each in unit)]  # fmt: skip
    assert len(left) > 1 and entry["guard"]["outcome"] == f"kept, but for {', '.join(left)}"
    assert validate(found) == {"accuracy": 1.0} and entry["changed"]


def test_labels_are_asked_for_by_taylor_alone() -> None:
    data = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches("bert")]
    prune(build("bert"), "heads", importance="activation", data=data)
    with pytest.raises(DataError, match="importance='taylor' needs examples with labels; 'activation' does without"):
        prune(build("bert"), "heads", importance="taylor", data=data)
    with pytest.raises(DataError, match="importance='activation' looks at examples: pass data="):
        prune(build("resnet18"), "channels", importance="activation")


# What cannot be removed.


def test_heads_of_an_unknown_form_are_refused_by_what_is_the_case() -> None:
    with pytest.raises(ValueError, match=r"has no attention heads to remove: DeepseekV3Attention has other"):
        prune(build("deepseek"), "heads")
    with pytest.raises(ValueError, match=r"Linear has no feed-forward neurons to remove: none of its modules has the"):
        prune(nn.Linear(2, 2), "neurons")


def test_a_refused_model_is_what_it_was() -> None:
    model = build("gpt2")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"no attention heads to remove \(blocks: transformer.h.0.attn, .*: widen"):
        prune(model, "heads", include=["nothing"])
    assert dict(model.named_modules()) == before


def test_a_model_that_would_not_run_without_its_heads_keeps_them() -> None:
    """Something outside the blocks counts on all heads, as position biases of some families do."""
    model: Any = build("llama")
    want, config = scores_of(model, "llama"), model.config.to_dict()

    def count(module: nn.Module, args: Any, result: Any) -> None:
        assert module.q_proj.out_features == 32, "four heads, please"

    handle = model.model.layers[1].self_attn.register_forward_hook(count)
    with pytest.raises(ValueError, match=r"does not run without these attention heads: .*; nothing was changed"):
        prune(model, "heads", 0.5)
    handle.remove()
    assert model.config.to_dict() == config and not hasattr(model, "pykd_report")
    assert torch.equal(scores_of(model, "llama"), want)
