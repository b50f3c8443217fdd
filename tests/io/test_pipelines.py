"""`pipeline(...)` of transformers works on what pykd saved, packed and dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

import pykd
from pykd.io.card import PIPELINES
from pykd.models.huggingface import load_huggingface

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "game", "is", "a", "small", "library", "for", "fonts"]
TEXT = "the game is small"
BERT = {"model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 40,
         "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 40, "image_size": 8, "patch_size": 4}  # fmt: skip
#: Task -> configuration, input, and what one answer has.
TASKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sequence-classification": (BERT, TEXT, "label"),
    "token-classification": (BERT, TEXT, "entity"),
    "masked-lm": (BERT, "the game is [MASK]", "token_str"),
    "causal-lm": (LLAMA, TEXT, "generated_text"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "model_max_length": 32}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(task: str, config: dict[str, Any], path: Path, format: str = "pykd", **companions: Any) -> Path:
    model = load_huggingface(None, task, config=config).eval()
    pykd.quantize(model, scheme="w8a16", embeddings="w8a16" if "vocab_size" in config else None)
    return pykd.save_pretrained(model, path, format=format, **companions)


@pytest.mark.parametrize("format", ["pykd", "dense"])
@pytest.mark.parametrize("task", TASKS)
def test_texts(task: str, format: str, tmp_path: Path, tokenizer: Any) -> None:
    config, text, key = TASKS[task]
    folder = save(task, config, tmp_path / "model", format, tokenizer=tokenizer)
    options = {"max_new_tokens": 2, "max_length": None} if task == "causal-lm" else {}
    (first, *_) = pipeline(PIPELINES[task], model=str(folder))(text, **options)
    assert key in first


def test_images(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    folder = save("image-classification", VIT, tmp_path / "model", processor=processor)
    answers = pipeline("image-classification", model=str(folder))(Image.new("RGB", (20, 20)))
    assert {answer["label"] for answer in answers} == {"LABEL_0", "LABEL_1"}


def test_a_new_process_needs_two_imports(tmp_path: Path, tokenizer: Any) -> None:
    folder = save("sequence-classification", BERT, tmp_path / "model", tokenizer=tokenizer)
    script = "import json, sys, pykd; from transformers import pipeline; "
    script += "print(json.dumps(pipeline('text-classification', model=sys.argv[1])(sys.argv[2])))"
    done = subprocess.run([sys.executable, "-c", script, str(folder), TEXT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (here,) = pipeline("text-classification", model=str(folder))(TEXT)
    (there,) = json.loads(done.stdout)
    assert there == {"label": here["label"], "score": pytest.approx(here["score"], rel=1e-6)}
