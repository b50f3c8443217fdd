"""Shared set-up: Triton's interpreter where there is no GPU, a fixed seed, no reach to any model hub, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores; before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What this machine measured for its user must not decide what the tests compute, nor the reverse.
os.environ["PYKD_CACHE"] = tempfile.mkdtemp(prefix="pykd-tests-")

import pytest

# A job in the background of a shell starts with Ctrl-C ignored, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with that reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forgets_compiled_code() -> Iterator[None]:
    """What one test compiled counts toward the limit of recompilations of the next, in any order of tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


#: Name of a tokenizer's special token -> what it is.
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]", "eos_token": "[EOS]"}  # fmt: skip


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., Any]:
    """word_tokenizer(texts, framed=False): a fast tokenizer of their words; framed adds [CLS] and [SEP] to a text."""

    def make(texts: Iterable[str], framed: bool = False) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(SPECIAL.values())))
        if framed:
            ends = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
            words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)

    return make


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB, which only root can mount; others have the tests that fake a full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system needs root and the right to mount; full disks are also tested by faked errors")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
