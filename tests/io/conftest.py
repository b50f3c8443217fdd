"""Small models of real architectures, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision

TINY: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 99,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 40,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    },
}
FAMILIES = (*TINY, "resnet18", "mobilenet_v2")


def make_model(family: str) -> nn.Module:
    """A randomly initialised model in eval mode, with batch-norm statistics and biases that are not trivial."""
    torch.manual_seed(0)
    if family in TINY:
        task = "image-classification" if family == "vit" else "sequence-classification"
        model = load_huggingface(None, task, num_labels=5, config=TINY[family])
    else:
        model = load_torchvision(family, 5)
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
    size = 16 if family == "vit" else 64
    return {"pixel_values": torch.randn(3, 3, size, size, generator=generator)}


@pytest.fixture
def model_of() -> Callable[[str], nn.Module]:
    return make_model


@pytest.fixture
def batch_of() -> Callable[[str], dict[str, Tensor]]:
    return make_batch
