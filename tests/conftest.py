"""Shared set-up: Triton's interpreter where there is no GPU, a fixed seed, no reach to any model hub, and Ctrl-C."""

from __future__ import annotations

import functools
import os
import shutil
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


#: Browsers that draw a page without a window.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test whose marks ask for what this machine lacks is skipped, with that reason."""
    for item in items:
        lacking = [reason for mark in item.iter_markers() if (reason := _lacking(mark))]
        if lacking:
            item.add_marker(pytest.mark.skip(reason=lacking[0]))


def _lacking(mark: pytest.Mark) -> str:
    if mark.name == "gpu":
        gigabytes = mark.kwargs.get("gigabytes", 0)
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        return f"needs {gigabytes} GB of free GPU memory" if torch.cuda.mem_get_info()[0] < gigabytes * 1e9 else ""
    if mark.name == "browser":
        return "" if any(map(shutil.which, BROWSERS)) else f"needs a browser: {', '.join(BROWSERS)}"
    if mark.name == "mount":
        return "" if _may_mount() else "needs the right to mount a file system (CAP_SYS_ADMIN)"
    return ""


def _may_mount() -> bool:
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    rights = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(rights >> 21 & 1)


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
    """A folder on a file system of 64 KiB, for tests marked `mount`; faked errors test full disks everywhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Runs of recipes on one thread, without a second of waiting for a throughput, the reload in the same process."""
    from pykd.evaluation import measure
    from pykd.pipeline import evaluate_saved
    from pykd.pipeline.reload import Reload

    def reload(model: Path, recipe: Path, predictions: Any, *, batch_size: int) -> Reload:
        found = evaluate_saved(model, recipe=recipe, batch_size=batch_size, latency_rounds=1).predictions
        return Reload("pykd evaluate", len(found), sum(a != b for a, b in zip(found, predictions, strict=True)))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pykd.pipeline.runner.check_reload", reload)
        patch.setattr(measure, "measure_throughput", functools.partial(measure.measure_throughput, seconds=0.01))
        yield
    torch.set_num_threads(threads)
