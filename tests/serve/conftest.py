"""Tiny models of every kind that is served, saved as pykd saves them, and a client inside the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from pykd import quantize, save_pretrained
from pykd.data import load_digits
from pykd.models.huggingface import load_huggingface
from pykd.models.torchvision import load_torchvision
from pykd.serve import Settings
from pykd.serve.app import create_app

from ..pipeline.conftest import library

__all__ = ["library"]

TEXTS = ("a library for reading images", "plays music", "the network daemon that answers every request at once")
BERT = {
    "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 24,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TAGS = ("B-PACKAGE", "I-PACKAGE", "O")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Callable[..., Any]) -> dict[str, Path]:
    """Kind -> folder of a saved model."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("served")
    tokenizer = word_tokenizer(TEXTS, framed=True)
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}

    def save(kind: str, model: Any, class_names: tuple[str, ...], **data: Any) -> Path:
        provenance = {"data": {"class_names": list(class_names), **data}}
        reader = None if "image" in kind else tokenizer
        return save_pretrained(model, base / kind, tokenizer=reader, provenance=provenance)

    text = load_huggingface(None, "sequence-classification", num_labels=3, config={**BERT, **words})
    tags = load_huggingface(None, "token-classification", num_labels=3, config={**BERT, **words})
    t5 = load_huggingface(None, "seq2seq-lm", config={**T5, **words, "eos_token_id": tokenizer.eos_token_id})
    vit = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    image = load_huggingface(
        None, "image-classification", num_labels=10,
        config={**vit, "num_attention_heads": 2, "intermediate_size": 64},
    )  # fmt: skip
    prepared = load_digits(image_size=16).preprocessing
    squeeze = load_torchvision("squeezenet1_1", num_classes=4)
    return {
        "text": save("text", quantize(text.eval(), "w8a8"), ("images", "sound", "net")),
        "tags": save("tags", tags, TAGS),
        "t5": save("t5", t5, ()),
        "image": save("image", image, tuple("0123456789"), preprocessing=prepared),
        "torchvision-image": save("torchvision-image", squeeze, ("n", "e", "s", "w"), preprocessing={"image_size": 64}),
    }


Make = Callable[..., FastAPI]


@pytest.fixture
def make_app(folders: dict[str, Path]) -> Make:
    """make_app("text", "t5", max_inputs=2): a service of these models under these settings."""

    def make(*kinds: str, **settings: Any) -> FastAPI:
        return create_app(Settings(models=tuple(f"{kind}={folders[kind]}" for kind in kinds), **settings))

    return make


def client_of(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """A client of the application, without a network."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request and its answer."""

    async def one() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())


def predict(app: FastAPI, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    """One `POST /predict`."""
    return ask(app, "POST", "/predict", json=body, headers=headers)
