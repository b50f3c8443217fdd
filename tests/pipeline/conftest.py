"""Reference models with random weights as caches and folders hold them, and a recipe for a tiny transformer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision

REVISION = "0123456789abcdef0123456789abcdef01234567"
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert", "vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 37,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 37, "num_layers": 1, "num_heads": 2,
}  # fmt: skip
VIT = {
    "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four: a plain folder, a Hugging Face cache, a safetensors file, and a `.pth` as in torchvision's cache."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("library")
    distilbert: Any = load_huggingface(None, "masked-lm", config=DISTILBERT)
    distilbert.save_pretrained(base / "distilbert-base-uncased")
    cached = base / "models--google-t5--t5-small"
    t5: Any = load_huggingface(None, "seq2seq-lm", config=T5)
    t5.save_pretrained(cached / "snapshots" / REVISION)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(REVISION)
    from safetensors.torch import save_file

    save_file(load_torchvision("mobilenet_v2").state_dict(), base / "mobilenet_v2.safetensors")
    (base / "checkpoints").mkdir()
    torch.save(load_torchvision("resnet18").state_dict(), base / "checkpoints" / "resnet18-f37072fd.pth")
    return base


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """A recipe to be completed with stages; not to be changed."""
    training = {"max_steps": 6, "batch_size": 32, "lr": 3e-3}
    return {
        "name": "tiny",
        "data": {"kind": "digits", "image_size": 8, "test_size": 60},
        "teacher": {"source": "huggingface", "config": VIT, "train": training},
        "evaluate": {"latency_rounds": 2, "speed_rounds": 2},
    }


@pytest.fixture(scope="module")
def pageless(quick: None) -> Iterator[None]:
    """Quick runs whose reports come without the page, which takes longer to draw than all else takes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pykd.evaluation.report_files.render", lambda story: f"<title>{story.title}</title>")
        yield
