"""kd_loss_topk, forward and backward, beside torch eager, torch.compile, and the limit: torch.neg(s, out=o).

The limit reads the student's logits and writes one tensor of their size, which is what the loss must move: the kept
classes are few. Every variant's loss and gradient are checked against float64 first. `extra_info` holds the bandwidth
that the moved bytes imply and the time over that of the limit measured in the same test. A second test prints ratios
of interleaved rounds, which load on the machine moves far less than times. PYKD_BENCH=small runs the smallest shape.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_timing import Logits, Variant, interleaved, timed, under_autograd
from torch import Tensor

import pykd

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(64, 1000, 16)] if SMALL else [(4096, 1000, 16), (1024, 32_000, 64), (256, 151_936, 64)]
ROUNDS = 1 if SMALL else 7
ALPHA = 0.5


def torch_kd_loss_topk(student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor, tail: bool) -> Tensor:
    """The loss as users of torch write it: in float32, or in float64 for float64 logits."""
    student = student if student.dtype == torch.float64 else student.float()
    log_p, log_q = student.log_softmax(-1), log_probs.to(student.dtype)
    soft = (log_q.exp() * (log_q - log_p.gather(1, ids))).sum(-1)
    if tail:
        rest = 1 - log_q.exp().sum(-1)
        others = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
        soft = soft + rest * (rest.log() - others)
    return ALPHA * soft.mean() + (1 - ALPHA) * F.cross_entropy(student, labels)


class Case:
    """Logits of one shape with a teacher's top k, and every variant as a step with its own preparation."""

    def __init__(self, rows: int, classes: int, kept: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = torch.randn(rows, classes, generator=generator) * 3
        teacher = torch.randn(rows, classes, generator=generator) * 3
        self.log_probs, self.ids = teacher.log_softmax(-1).topk(kept)
        self.labels = torch.randint(0, classes, (rows,), generator=generator)
        self.out = torch.zeros_like(self.student)
        self.compiled: Any = torch.compile(torch_kd_loss_topk, fullgraph=True, dynamic=False)

    def variant(self, name: str) -> Variant:
        """(preparation, step) of one variant; "bf16" and "tail" in the name choose the element type and the loss."""
        dtype, tail = torch.bfloat16 if "bf16" in name else torch.float32, "tail" in name

        def step(logits: Logits) -> tuple[Tensor, Tensor]:
            leaf, student = logits
            if name.startswith("pykd"):
                loss = pykd.kd_loss_topk(student, self.ids, self.log_probs, self.labels, alpha=ALPHA,
                                         missing="tail" if tail else "zero", inplace="in place" in name)  # fmt: skip
            else:
                call = self.compiled if "compile" in name else torch_kd_loss_topk
                loss = call(student, self.ids, self.log_probs, self.labels, tail)
            return loss, torch.autograd.grad(loss, leaf)[0]

        return lambda: under_autograd(self.student.to(dtype)), step

    def limit(self) -> None:
        torch.neg(self.student, out=self.out)


VARIANTS = ["pykd in place", "pykd fresh", "pykd bf16 in place", "torch eager", "torch compile",
            "pykd tail in place", "torch tail eager", "torch tail compile"]  # fmt: skip


def check(case: Case, name: str) -> None:
    """Loss and gradient of a few rows of the real call against float64."""
    prepare, step = case.variant(name)
    loss, gradient = step(prepare())
    rows = slice(0, 8)
    exact = case.student[rows].to(gradient.dtype).double().requires_grad_()
    truth = torch_kd_loss_topk(exact, case.ids[rows], case.log_probs[rows].double(), case.labels[rows], "tail" in name)
    want = torch.autograd.grad(truth * (8 / len(case.student)), exact)[0]
    error = float((gradient[rows].double() - want).abs().max() / want.abs().max())
    assert error < (5e-3 if gradient.dtype == torch.bfloat16 else 1e-5), f"{name}: relative error {error:.1e}"
    assert bool(loss.isfinite())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_kl_div_topk(benchmark: Any, shape: tuple[int, int, int], name: str) -> None:
    case = Case(*shape)
    check(case, name)
    moved_bytes = 2 * case.student.numel() * (2 if "bf16" in name else 4)
    timed(benchmark, case.variant(name), case.limit, moved_bytes=moved_bytes, rounds=ROUNDS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: each variant's time over the limit's, and eager and compile over it (median of rounds)."""
    case = Case(*shape)
    for name in VARIANTS:
        check(case, name)
    variants = [case.variant(name) for name in VARIANTS]
    rounds = interleaved(case.limit, variants, ROUNDS)
    limit_ms = statistics.median(r[0] for r in rounds) * 1e3
    where = f"{torch.get_num_threads()} threads, {pykd.build_info()['isa']}"
    lines = ["", f"kd_loss_topk {shape[0]} x {shape[1]}, k={shape[2]}, {where}, torch.neg {limit_ms:.1f} ms"]
    lines.append(f"{'':24}{'ms':>9}{'x torch.neg':>13}{'eager /':>10}{'compile /':>11}")
    for i, name in enumerate(VARIANTS, 1):
        loss = "torch tail" if "tail" in name else "torch"
        peers = [VARIANTS.index(f"{loss} {how}") + 1 for how in ("eager", "compile")]
        pairs = [(i, 0), *((peer, i) for peer in peers)]
        ratios = [statistics.median(r[a] / r[b] for r in rounds) for a, b in pairs]
        median_ms = statistics.median(r[i] for r in rounds) * 1e3
        lines.append(f"{name:24}{median_ms:9.1f}{ratios[0]:13.2f}{ratios[1]:10.1f}{ratios[2]:11.1f}")
    with capsys.disabled():
        print("\n".join(lines))
