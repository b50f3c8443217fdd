"""Small models of real architectures, what can be done to them, and a batch for each."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.nn import Conv2d4bit, Conv2d8bit, Linear4bit, Linear8bit, SparseConv2d, SparseLinear
from pykd.nn.channels import remove_channels
from pykd.nn.codecs.sparse_formats import filled_mask
from pykd.nn.slicing import attention_blocks, feed_forward_blocks, keep_heads, keep_neurons

TINY: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 70,
        "max_position_embeddings": 40,
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 99,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 70,
        "max_position_embeddings": 40,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 70,
        "image_size": 16,
        "patch_size": 4,
    },
}


def make_model(family: str) -> nn.Module:
    return copy.deepcopy(_model(family))


@functools.cache
def _model(family: str) -> nn.Module:
    """A randomly initialised model in eval mode, with batch-norm statistics and biases that are not trivial."""
    torch.manual_seed(0)
    if family in TINY:
        task = "image-classification" if family == "vit" else "sequence-classification"
        model = load_huggingface(None, task, num_labels=5, config=TINY[family])
    else:
        model = load_torchvision(family, 5, **({"width_mult": 0.35} if family == "mobilenet_v2" else {}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith((".bias", ".running_mean")):
            nn.init.normal_(tensor, std=0.1)
    return model.eval()


def make_batch(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family in ("bert", "distilbert"):
        ids = torch.randint(0, 99, (3, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    size = 16 if family == "vit" else 32
    return {"pixel_values": torch.randn(3, 3, size, size, generator=generator)}


def prune(model: nn.Module) -> None:
    """Other widths in every block: heads and neurons of a transformer, channels of a convolutional network."""
    if not attention_blocks(model):
        remove_channels(model, torch.zeros(1, 3, 32, 32), 0.5)
    for index, attention in enumerate(attention_blocks(model)):
        keep_heads(attention, [0, 3][: index + 1])
    for index, feed_forward in enumerate(feed_forward_blocks(model)):
        keep_neurons(feed_forward, range(index, 37))


def replace(model: nn.Module, linear: Callable[[Any], nn.Module], conv: Callable[[Any], nn.Module]) -> None:
    """Replace every linear layer and convolution but the first and the last layer."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for name, layer in layers[1:-1]:
        parent, _, child = name.rpartition(".")
        new = linear(layer) if isinstance(layer, nn.Linear) else conv(layer)
        setattr(model.get_submodule(parent), child, new)


def zero_small_weights(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight = layer.weight.detach()
            weight[weight.abs() < weight.abs().mean()] = 0


def to_4bit(model: nn.Module) -> None:
    replace(model, Linear4bit.from_linear, Conv2d4bit.from_conv2d)


def to_8bit(model: nn.Module) -> None:
    replace(model, Linear8bit.from_linear, Conv2d8bit.from_conv2d)


def to_sparse(model: nn.Module) -> None:
    zero_small_weights(model)
    replace(model, SparseLinear.from_linear, SparseConv2d.from_conv2d)


def to_sparse_formats(model: nn.Module) -> None:
    """Sparse layers whose files say in turn as csr16, 2:4 and 4x1 what is kept."""
    formats = itertools.cycle(("csr16", "2:4", "4x1"))

    def masked(layer: Any) -> dict[str, Any]:
        format, matrix = next(formats), layer.weight.detach().flatten(1)
        seen = torch.zeros_like(matrix) if format == "2:4" else matrix * (torch.rand_like(matrix) < 0.1)
        return {"mask": filled_mask(seen, format).view(layer.weight.shape), "format": format}

    replace(
        model,
        lambda layer: SparseLinear.from_linear(layer, **masked(layer)),
        lambda layer: SparseConv2d.from_conv2d(layer, **masked(layer)),
    )


def to_sparse_4bit(model: nn.Module) -> None:
    zero_small_weights(model)
    to_4bit(model)


def prune_to_4bit(model: nn.Module) -> None:
    prune(model)
    to_4bit(model)


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "plain": lambda model: None,
    "pruned": prune,
    "4bit": to_4bit,
    "8bit": to_8bit,
    "sparse": to_sparse,
    "sparse_formats": to_sparse_formats,
    "sparse_4bit": to_sparse_4bit,
    "pruned_4bit": prune_to_4bit,
}


@functools.cache
def _narrow_resnet18() -> nn.Module:
    """What is compressed in place of the full network, to keep the tests fast."""
    model = make_model("resnet18")
    remove_channels(model, torch.zeros(1, 3, 32, 32), 0.75)
    return model


def make_variant(family: str, variant: str) -> nn.Module:
    wide = family == "resnet18" and variant not in ("plain", "pruned")
    model = copy.deepcopy(_narrow_resnet18()) if wide else make_model(family)
    VARIANTS[variant](model)
    return model.eval()


@pytest.fixture(scope="session")
def models() -> Callable[[str], nn.Module]:
    return make_model


@pytest.fixture(scope="session")
def variants() -> Callable[[str, str], nn.Module]:
    return make_variant


@pytest.fixture(scope="session")
def batches() -> Callable[[str], dict[str, Tensor]]:
    return make_batch
