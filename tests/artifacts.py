"""The small saved models in tests/data_files/artifacts: how they were made, and how to add one.

Each folder is what `pykd.save_pretrained` of its time wrote, with `expected.safetensors` beside it: a batch, and the
logits of the model that was saved. tests/io/test_artifacts.py loads every one with the code of today, for ever.

A new kind of layer, scheme or family gets one line in `KINDS`, and then, in the repository's root:

    python tests/artifacts.py            # makes the folders that are not there yet, and leaves the others alone

A folder that exists is never made again: it is the promise. When the format changes, add a kind under a new name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pykd
from pykd.models.adapter import logits
from pykd.models.example import example_batch
from pykd.models.huggingface import load_huggingface
from pykd.models.router_teacher import from_teacher
from pykd.models.router_threshold import calibrate
from pykd.models.torchvision import load_torchvision
from pykd.nn import Conv2d16bit, Linear4bit, Linear8bit, codebook_code
from pykd.nn.linear_8bit import StaticInput
from pykd.nn.slicing import attention_blocks, feed_forward_blocks, keep_heads, keep_neurons

ROOT = Path(__file__).parent / "data_files" / "artifacts"
BERT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 40, "max_position_embeddings": 16}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
       "intermediate_size": 40, "image_size": 8, "patch_size": 4}  # fmt: skip

Made = tuple[nn.Module, dict[str, Tensor]]


def bert(**options: Any) -> nn.Module:
    return load_huggingface(None, "sequence-classification", num_labels=3, config=BERT).eval()


def llama() -> nn.Module:
    return load_huggingface(None, "causal-lm", config=LLAMA).eval()


def t5() -> nn.Module:
    return load_huggingface(None, "seq2seq-lm", config=T5).eval()


def vit() -> nn.Module:
    return load_huggingface(None, "image-classification", num_labels=3, config=VIT).eval()


def mobilenet() -> nn.Module:
    """Few channels and the first blocks only: convolutions of every sort, grouped and 1x1."""
    model: Any = load_torchvision(
        "mobilenet_v2", 3, width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 2]]
    )
    model.features[-1][0] = nn.Conv2d(8, 16, 1, bias=False)
    model.features[-1][1] = nn.BatchNorm2d(16)
    model.classifier[1] = nn.Linear(16, 3)
    return model.eval()


def quantized(make: Callable[[], nn.Module], scheme: str, **options: Any) -> nn.Module:
    return pykd.quantize(make(), scheme=scheme, **options)


def zeroed(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return pykd.prune(make(), "magnitude", **options)


def uneven() -> nn.Module:
    """Heads and neurons of other numbers in every layer."""
    model = bert()
    for index, block in enumerate(attention_blocks(model)):
        keep_heads(block, [0, 3][: index + 1])
    for index, block in enumerate(feed_forward_blocks(model)):
        keep_neurons(block, range(index, 21))
    return model


def replaced(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """One layer of BERT in another form."""
    model: Any = bert()
    layer = model.bert.encoder.layer[0].intermediate
    layer.dense = make(layer.dense)
    return model


def mobilenet_16bit() -> nn.Module:
    model: Any = mobilenet()
    block = model.features[2].conv
    block[0][0], block[1][0] = (Conv2d16bit.from_conv2d(block[index][0]) for index in (0, 1))
    return model


def router() -> nn.Module:
    """Both branches, experts and the router; one of the two rows goes deep."""
    model: Any = from_teacher(bert(), experts=2, router_size=8, expert_size=16)
    pykd.quantize(model, "w8a8", embeddings="w8a16")
    calibrate(model.eval(), [example_batch(model, rows=2, length=6, seed=1)], deep_share=0.5)
    return model  # type: ignore[no-any-return]


TABLE = codebook_code([k / 8 - 1 for k in range(16)])
STATIC = StaticInput(0.03125, -5)

#: Folder -> the model. One line per kind.
KINDS: dict[str, Callable[[], nn.Module]] = {
    "bert_plain": bert,
    "bert_w4a16": lambda: quantized(bert, "w4a16", group_size=32),
    "bert_w4a16_asymmetric": lambda: quantized(bert, "w4a16", group_size=16, symmetric=False),
    "bert_w4a16_rows": lambda: quantized(bert, "w4a16", group_size=None),
    "bert_w4a8": lambda: quantized(bert, "w4a8", group_size=32),
    "bert_nf4": lambda: quantized(bert, "nf4", group_size=32),
    "bert_fp4": lambda: quantized(bert, "fp4", group_size=32),
    "bert_codebook": lambda: quantized(bert, TABLE, group_size=32),
    "bert_w8a8": lambda: quantized(bert, "w8a8"),
    "bert_w8a16": lambda: quantized(bert, "w8a16"),
    "bert_w8a16_groups": lambda: replaced(lambda x: Linear8bit.from_linear(x, scheme="w8a16", group_size=16)),
    "bert_w8a8_static": lambda: replaced(lambda x: Linear8bit.from_linear(x, scheme="w8a8_static", static=STATIC)),
    "bert_w4a16_gelu": lambda: replaced(lambda x: Linear4bit.from_linear(x, activation="gelu")),
    "bert_bf16": lambda: quantized(bert, "bf16"),
    "bert_bfloat16": lambda: quantized(lambda: bert().to(torch.bfloat16), "w4a16", group_size=32),
    "bert_embeddings_w8a16": lambda: quantized(bert, "w8a8", embeddings="w8a16"),
    "bert_embeddings_bf16": lambda: quantized(bert, "bf16", embeddings="bf16"),
    "bert_embeddings_nf4": lambda: quantized(bert, "w4a16", group_size=32, embeddings="nf4"),
    "bert_sparse": lambda: zeroed(bert, sparsity=0.7),
    "bert_sparse_most": lambda: zeroed(bert, sparsity=0.97),
    "bert_sparse_2_of_4": lambda: zeroed(bert, pattern="2:4"),
    "bert_sparse_blocks": lambda: zeroed(bert, pattern="4x1"),
    "bert_sparse_w4a16": lambda: quantized(lambda: zeroed(bert, sparsity=0.7), "w4a16", group_size=32),
    "bert_sparse_w8a8": lambda: quantized(lambda: zeroed(bert, sparsity=0.7), "w8a8"),
    "bert_uneven": uneven,
    "bert_uneven_w4a16": lambda: quantized(uneven, "w4a16", group_size=32),
    "bert_one_layer_less": lambda: pykd.prune(bert(), "layers", sparsity=0.5),
    "llama_tied_w4a16": lambda: quantized(llama, "w4a16", group_size=16, embeddings="w4a16"),
    "llama_tied_w8a8": lambda: quantized(llama, "w8a8", embeddings="w8a16"),
    "t5_shared_w8a16": lambda: quantized(t5, "w4a16", group_size=16, embeddings="w8a16"),
    "vit_w4a16": lambda: quantized(vit, "w4a16", group_size=32),
    "router_w8a8": router,
    "mobilenet_plain": mobilenet,
    "mobilenet_w4a16": lambda: quantized(mobilenet, "w4a16", group_size=16),
    "mobilenet_w8a8": lambda: quantized(mobilenet, "w8a8"),
    "mobilenet_bf16": mobilenet_16bit,
    "mobilenet_sparse": lambda: zeroed(mobilenet, sparsity=0.7, include=["*"]),
    "mobilenet_channels": lambda: pykd.prune(mobilenet(), "channels", sparsity=0.25, example=torch.zeros(1, 3, 16, 16)),
}


def make(name: str) -> None:
    """Write one folder."""
    torch.manual_seed(0)
    model = KINDS[name]().eval()
    batch = example_batch(model, rows=2, length=6, image_size=16, seed=1)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = {key: value.to(dtype) if value.is_floating_point() else value.contiguous() for key, value in batch.items()}
    batch = {key: value.clone() for key, value in batch.items()}
    with torch.no_grad():
        expected = logits(model, batch)
    pykd.save_pretrained(model, ROOT / name)
    save_file({**batch, "expected": expected}, ROOT / f"{name}.safetensors")


if __name__ == "__main__":
    for kind in KINDS:
        if not (ROOT / kind).exists():
            make(kind)
            print(kind, sum(file.stat().st_size for file in (ROOT / kind).iterdir()))
