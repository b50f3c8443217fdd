"""Steps of `fit`, the loop behind `distill`, beside a bare loop of the same passes and Hugging Face's Trainer.

A BERT teacher of 6 layers 512 wide, a student of 4 layers 312 wide, a vocabulary of 32,000, batches of 32 x 128 tokens
with a label at every position; AdamW, clipping, dropout off. The three start from the same weights and take the same
batches: their losses must agree before anything is timed. Times are medians of rounds in which they take turns, each
of several steps; the ratios are medians of the rounds' ratios. Where the CPU has no bfloat16 arithmetic that case takes
one round of one step, more than five minutes in all on 2 cores of a Zen 3. PYKD_BENCH=small runs a small shape once.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykd
from pykd.training import TrainConfig, fit

SMALL = os.environ.get("PYKD_BENCH") == "small"
VOCABULARY, ROWS, TOKENS = (500, 4, 16) if SMALL else (32_000, 32, 128)
SHAPES = {"teacher": (2, 32, 2), "student": (1, 24, 2)} if SMALL else {"teacher": (6, 512, 8), "student": (4, 312, 12)}
ROUNDS, STEPS = (1, 2) if SMALL else (3, 2)
TEMPERATURE, ALPHA, LR = 4.0, 0.5, 1e-4

Batch = dict[str, Tensor]
Trained = tuple[float, list[float]]


def bert(role: str) -> Any:
    """A masked language model of the role's shape, without dropout, with weights of its own."""
    from transformers import BertConfig, BertForMaskedLM

    layers, width, heads = SHAPES[role]
    torch.manual_seed(len(role) + layers)
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def batches(count: int) -> list[Batch]:
    """Random tokens; every position has a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (count, 2, ROWS, TOKENS), generator=generator)
    return [{"input_ids": pair[0], "labels": pair[1]} for pair in ids]


def eager_loss(scores: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """The loss as users of torch write it."""
    logs = [(x.float() / TEMPERATURE).log_softmax(-1).flatten(0, 1) for x in (scores, wanted)]
    soft = F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(scores.float().flatten(0, 1), labels.flatten())


def by_fit(student: nn.Module, teacher: nn.Module, data: list[Batch], dtype: torch.dtype | None) -> Trained:
    """pykd.training.fit with the loss that `distill` trains with."""
    began = time.perf_counter()

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits
        scores = model(input_ids=batch["input_ids"]).logits
        return pykd.kd_loss(scores, wanted, batch["labels"], temperature=TEMPERATURE, alpha=ALPHA), {}

    config = TrainConfig(lr=LR, warmup_ratio=0, autocast="bfloat16" if dtype else None)
    history = fit(student, data, loss_fn, config, progress=False)
    return time.perf_counter() - began, [record["loss"] for record in history.records]


def bare(student: nn.Module, teacher: nn.Module, data: list[Batch], dtype: torch.dtype | None) -> Trained:
    """The same passes, loss and update with nothing around them."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.01)
    student.train()
    losses = []
    began = time.perf_counter()
    for batch in data:
        with autocast(dtype):
            with torch.no_grad():
                wanted = teacher(input_ids=batch["input_ids"]).logits
            scores = student(input_ids=batch["input_ids"]).logits
            loss = pykd.kd_loss(scores, wanted, batch["labels"], temperature=TEMPERATURE, alpha=ALPHA)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return time.perf_counter() - began, losses


def by_trainer(student: nn.Module, teacher: nn.Module, data: list[Batch], dtype: torch.dtype | None) -> Trained:
    """Hugging Face's Trainer with the loss in eager torch."""
    from transformers import Trainer, TrainingArguments

    class Eager(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            with torch.no_grad():
                wanted = teacher(input_ids=inputs["input_ids"]).logits
            return eager_loss(model(input_ids=inputs["input_ids"]).logits, wanted, inputs["labels"])

        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=None))

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=len(data), learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.01,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=dtype is not None,
        )  # fmt: skip
        trainer = Eager(student, args, train_dataset=data)
        with contextlib.redirect_stdout(None):
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


WAYS: dict[str, Callable[..., Trained]] = {"fit": by_fit, "bare loop": bare, "Trainer, eager": by_trainer}


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype) if dtype is not None else contextlib.nullcontext()


def has_bf16() -> bool:
    """Whether torch multiplies in bfloat16 here; a CPU that cannot converts at every use."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_ratios(dtype: torch.dtype | None) -> None:
    """Losses agree; then steps a second, and the ratios of fit to the other two."""
    teacher, student = bert("teacher").eval(), bert("student")
    rounds, steps = (1, 1) if dtype is not None and not has_bf16() else (ROUNDS, STEPS)
    data = batches(steps)
    first = {name: way(copy.deepcopy(student), teacher, data[:1], dtype)[1][0] for name, way in WAYS.items()}
    for name, loss in first.items():
        torch.testing.assert_close(
            loss, first["bare loop"], rtol=2e-2 if dtype else 1e-4, atol=0, msg=f"{name}: {first}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    names = list(WAYS)
    for turn in range(rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            seconds[name].append(WAYS[name](copy.deepcopy(student), teacher, data, dtype)[0] / steps)
    kind = "bf16 autocast" if dtype else "fp32"
    print(f"\n{kind}, {ROWS} x {TOKENS} tokens, {VOCABULARY} classes, {torch.get_num_threads()} threads, "
          f"{rounds} rounds of {steps} steps")  # fmt: skip
    for name, each in seconds.items():
        ratio = statistics.median(other / mine for other, mine in zip(each, seconds["fit"], strict=True))
        print(f"{name:<16} {1 / statistics.median(each):8.3f} steps/s   fit is {ratio:.2f}x as fast")
