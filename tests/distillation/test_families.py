"""Every family end to end: a student cut from its teacher, distilled, saved, and loaded by the official classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykd
from pykd.data.bundle import Batch, DataBundle, stack
from pykd.distillation import distill
from pykd.models.adapter import logits
from pykd.models.huggingface import TASKS, load_huggingface
from pykd.models.students import derive

BODY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
          "n_shared_experts": 1, "first_k_dense_replace": 2, "num_key_value_heads": 4}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0,
      "pad_token_id": 0, "eos_token_id": 5}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
        "pad_token_id": 0, "decoder_start_token_id": 5}  # fmt: skip
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
VIT = {**BODY, "image_size": 16, "patch_size": 8}

FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("distilbert", "sequence-classification", DISTILBERT),
    ("bert", "sequence-classification", BODY),
    ("bert", "token-classification", BODY),
    ("camembert", "token-classification", {**BODY, "pad_token_id": 0}),
    ("distilbert", "masked-lm", DISTILBERT),
    ("camembert", "masked-lm", {**BODY, "pad_token_id": 0}),
    ("t5", "seq2seq-lm", T5),
    ("bart", "seq2seq-lm", BART),
    ("llama", "causal-lm", {**BODY, "num_key_value_heads": 2}),
    ("llama", "sequence-classification", {**BODY, "pad_token_id": 0}),
    ("deepseek_v3", "causal-lm", {**BODY, **LATENT}),
    ("vit", "image-classification", VIT),
]


def images() -> DataBundle:
    generator = torch.Generator().manual_seed(0)
    items = [{"pixel_values": torch.randn(3, 16, 16, generator=generator) + i % 2, "labels": i % 2} for i in range(24)]
    return DataBundle(items, items, stack, ["dark", "light"], "images", fingerprint="images")


def make(family: str, task: str, config: dict[str, Any], data: DataBundle) -> nn.Module:
    vocabulary = {} if data.tokenizer is None else {"vocab_size": len(data.tokenizer)}
    labels = {"num_labels": len(data.class_names)} if data.class_names else {}
    torch.manual_seed(0)
    return load_huggingface(None, task, config={"model_type": family, **vocabulary, **config}, **labels)


@pytest.mark.parametrize(("family", "task", "config"), FAMILIES, ids=[f"{f}-{t}" for f, t, _ in FAMILIES])
def test_trains_saves_and_reloads(
    family: str, task: str, config: dict[str, Any], bundles: dict[str, DataBundle], tmp_path: Path
) -> None:
    data = images() if task == "image-classification" else bundles[task]
    teacher = make(family, task, config, data)
    pykd.finetune(teacher, data, epochs=12, batch_size=8, lr=5e-3, progress=False)
    assert fallen(teacher) < 0.9
    student = derive(teacher, depth=2)
    distill(student, teacher, data, epochs=5, batch_size=8, lr=3e-3, temperature=2.0, progress=False)
    assert fallen(student) < 1
    batch = data.example(4)
    want = scores(student, batch)
    pykd.save_pretrained(student, tmp_path / "model", tokenizer=data.tokenizer)
    import transformers

    official = getattr(transformers, TASKS[task]).from_pretrained(tmp_path / "model")
    assert type(official) is type(student)
    assert torch.equal(scores(official, batch), want)
    again = pykd.from_pretrained(tmp_path / "model")
    assert torch.equal(scores(again, batch), want)


def fallen(model: nn.Module) -> float:
    """Loss of the last third of the latest training, as a share of that of the first third."""
    losses = [record["loss"] for record in model.pykd_report[-1]["curve"]]
    third = len(losses) // 3
    return sum(losses[-third:]) / sum(losses[:third])


def scores(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return logits(model.eval(), batch)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision(name: str, tmp_path: Path) -> None:
    from pykd.models.torchvision import load_torchvision

    torch.manual_seed(0)
    options = {"width_mult": 0.25} if name == "mobilenet_v2" else {}
    teacher, data = load_torchvision(name, num_classes=2, **options), images()
    student = derive(teacher, width=0.5, example=data.example(2))
    distill(student, teacher, data, epochs=8, batch_size=8, lr=3e-3, progress=False)
    assert fallen(student) < 1
    want = scores(student, data.example(4))
    pykd.save_pretrained(student, tmp_path / "model")
    assert torch.equal(scores(pykd.from_pretrained(tmp_path / "model"), data.example(4)), want)
