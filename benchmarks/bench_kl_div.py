"""kd_loss, forward and backward, beside torch eager, torch.compile, and the limit: torch.add(s, t, out=o).

The limit reads both logits and writes one tensor of their size, which is what the loss must move. Every variant's loss
and gradient are checked against float64 first. `extra_info` holds the bytes moved, the bandwidth they imply and the
share of the limit measured in the same test. A second test prints ratios of interleaved rounds, which load on the
machine moves far less than times, and the memory of a call beside its gradient. PYKD_BENCH=small runs the smallest
shape once.

On a GPU (marker gpu), kl_div alone in bf16: calls of kd_loss, each kernel by itself, eager, torch.compile and
Liger's kl_div after two log_softmax, as shares of the copy bandwidth measured beside them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import copy_bytes_per_s, peak_extra_bytes
from loss_timing import Logits, Step, Variant, interleaved, timed, under_autograd
from torch import Tensor

import pykd
from pykd.evaluation.footprint import _watched
from pykd.ops import kl_div_gpu, memory
from pykd.ops.kl_div import Options

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(64, 1000)] if SMALL else [(4096, 1000), (1024, 32_000), (256, 151_936)]
ROUNDS = 1 if SMALL else 7
TEMPERATURE, ALPHA = 4.0, 0.5


def torch_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss as users of torch write it."""
    logs = [(x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher)]
    soft = F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student.float(), labels)


class Case:
    """Logits of one shape, and every variant as a step with its own preparation."""

    def __init__(self, rows: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = torch.randn(rows, classes, generator=generator) * 3
        self.teacher = torch.randn(rows, classes, generator=generator) * 3
        self.labels = torch.randint(0, classes, (rows,), generator=generator)
        self.out = torch.zeros_like(self.student)
        self.compiled: Any = torch.compile(torch_kd_loss, fullgraph=True, dynamic=False)

    def variant(self, name: str) -> Variant:
        """(preparation, step) of one variant; "bf16" in the name chooses the element type."""
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        teacher, labels = self.teacher.to(dtype), self.labels
        more = self.options(name.split()[-1])

        def prepare() -> Logits:
            if "new pages" in name:
                memory._POOL.free.clear()
            return under_autograd(self.student.to(dtype))

        def step(logits: Logits) -> tuple[Tensor, Tensor]:
            leaf, student = logits
            if name.startswith("pykd"):
                loss = pykd.kd_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=ALPHA,
                                    inplace="in place" in name, **more)  # fmt: skip
            else:
                loss = (self.compiled if "compile" in name else torch_kd_loss)(student, teacher, labels)
            return loss, torch.autograd.grad(loss, leaf)[0]

        return prepare, step

    def options(self, word: str) -> dict[str, Any]:
        """What the last word of a variant's name asks for besides the plain loss."""
        if word in ("reverse", "jsd", "tv"):
            return {"direction": word}
        if word != "options":
            return {}
        rows = len(self.labels)
        return {"label_smoothing": 0.1, "weights": torch.linspace(0.5, 1.5, rows), "mask": torch.arange(rows) >= 0}

    def limit(self) -> None:
        torch.add(self.student, self.teacher, out=self.out)


#: "fresh" gradients come from memory that the step before has freed, "new pages" from huge pages never touched before.
VARIANTS = ["pykd in place", "pykd fresh", "pykd new pages", "pykd bf16 in place", "torch eager", "torch compile"]
OTHERS = ["pykd in place reverse", "pykd in place tv", "pykd in place jsd", "pykd in place options"]


def check(case: Case, name: str) -> None:
    """Loss and gradient of a few rows of the real call against float64."""
    prepare, step = case.variant(name)
    loss, gradient = step(prepare())
    rows = slice(0, 8)
    exact = case.student[rows].to(gradient.dtype).double().requires_grad_()
    teacher = case.teacher[rows].to(gradient.dtype)
    scale = 8 / len(case.student)
    want = torch.autograd.grad(torch_kd_loss_double(exact, teacher.double(), case.labels[rows]) * scale, exact)[0]
    error = float((gradient[rows].double() - want).abs().max() / want.abs().max())
    assert error < (5e-3 if gradient.dtype == torch.bfloat16 else 1e-5), f"{name}: relative error {error:.1e}"
    assert bool(loss.isfinite())


def torch_kd_loss_double(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    logs = [(x / TEMPERATURE).log_softmax(-1) for x in (student, teacher)]
    soft = F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_kl_div(benchmark: Any, shape: tuple[int, int], name: str) -> None:
    case = Case(*shape)
    check(case, name)
    moved_bytes = 3 * case.student.numel() * (2 if "bf16" in name else 4)
    timed(benchmark, case.variant(name), case.limit, moved_bytes=moved_bytes, rounds=ROUNDS)


def extra_bytes(prepare: Callable[[], Logits], step: Step) -> int:
    """Most memory of the process above what was there before the step, less the gradient that the step returns."""
    logits = prepare()
    memory._POOL.free.clear()  # the gradient's memory shall count
    with _watched(torch.device("cpu")) as rise:
        gradient = step(logits)[1]
    returned = 0 if gradient.data_ptr() == logits[1].data_ptr() else gradient.nbytes
    return max(0, rise[0] - returned)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: each variant's time over the limit's, and eager and compile over pykd (median of rounds)."""
    case = Case(*shape)
    for name in VARIANTS:
        check(case, name)
    names = [*VARIANTS, *OTHERS]
    variants = [case.variant(name) for name in names]
    rounds = interleaved(case.limit, variants, ROUNDS)
    extra = [extra_bytes(*variant) / 1e6 for variant in variants]
    eager, compiled = names.index("torch eager") + 1, names.index("torch compile") + 1
    limit_ms = statistics.median(r[0] for r in rounds) * 1e3
    where = f"{torch.get_num_threads()} threads, {pykd.build_info()['isa']}"
    lines = ["", f"kd_loss {shape[0]} x {shape[1]}, T={TEMPERATURE:g}, {where}, torch.add {limit_ms:.1f} ms"]
    lines.append(f"{'':24}{'ms':>9}{'x torch.add':>13}{'eager /':>10}{'compile /':>11}{'extra MB':>10}")
    for i, name in enumerate(names, 1):
        ratios = [statistics.median(r[a] / r[b] for r in rounds) for a, b in ((i, 0), (eager, i), (compiled, i))]
        best_ms = statistics.median(r[i] for r in rounds) * 1e3
        lines.append(f"{name:24}{best_ms:9.1f}{ratios[0]:13.2f}{ratios[1]:10.1f}{ratios[2]:11.1f}{extra[i - 1]:10.1f}")
    with capsys.disabled():
        print("\n".join(lines))


GPU_SHAPES = [(64, 1000)] if SMALL else [(8192, 32_768), (8192, 128_256), (4096, 151_936)]
LAUNCHERS = {"kernel cuda": kl_div_gpu.launch_cuda, "kernel triton": kl_div_gpu.launch_triton}
GPU_VARIANTS = ["pykd in place", "pykd fresh", *LAUNCHERS, "torch eager", "torch compile"]
if importlib.util.find_spec("liger_kernel") is not None:  # a peer that pykd does not install: pip install liger-kernel
    GPU_VARIANTS.append("liger kl_div")


def torch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL as users of torch write it, in float32 over half-type logits."""
    logs = [(x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher)]
    return F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2


def liger_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The same with Liger's kernel, which takes logarithms of probabilities."""
    loss = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    logs = [(x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher)]
    return loss(*logs) * TEMPERATURE**2


def gpu_variant(name: str, teacher: Tensor) -> Step:
    """A step from bf16 student logits to (loss, gradient)."""
    if name in LAUNCHERS:
        options = Options(TEMPERATURE, "forward", 0.5, TEMPERATURE**2, 0.0, 0.0)
        scale = torch.full((len(teacher),), 1 / len(teacher), device=teacher.device)

        def kernel(given: Logits) -> tuple[Tensor, Tensor]:
            logits = given[1].detach()
            return kl_div_gpu.run(LAUNCHERS[name], logits, teacher, None, scale, logits, options).sum(), logits

        return kernel
    losses: dict[str, Callable[..., Tensor]] = {
        "pykd in place": functools.partial(pykd.kd_loss, labels=None, temperature=TEMPERATURE, alpha=1.0, inplace=True),
        "pykd fresh": functools.partial(pykd.kd_loss, labels=None, temperature=TEMPERATURE, alpha=1.0),
        "torch eager": torch_kl,
        "torch compile": torch.compile(torch_kl, fullgraph=True, dynamic=False),
        "liger kl_div": liger_kl,
    }

    def step(logits: Logits) -> tuple[Tensor, Tensor]:
        leaf, student = logits
        loss = losses[name](student, teacher)
        return loss, torch.autograd.grad(loss, leaf)[0]

    return step


def check_gpu(step: Step, student: Tensor, teacher: Tensor) -> None:
    """Gradient of a few rows of the real call, and the loss of all, against float64."""
    rows, exact = slice(0, 8), student[:8].double().requires_grad_()
    loss, gradient = step(under_autograd(student))
    logs = [(x.double() / TEMPERATURE).log_softmax(-1) for x in (exact, teacher[rows])]
    want = F.kl_div(*logs, log_target=True, reduction="sum") * TEMPERATURE**2 / len(student)
    (want_gradient,) = torch.autograd.grad(want, exact)
    error = float((gradient[rows].double() - want_gradient).abs().max() / want_gradient.abs().max())
    assert error < 5e-3, f"relative error {error:.1e}"
    assert bool(loss.isfinite())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", GPU_VARIANTS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def bench_kl_div_gpu(benchmark: Any, shape: tuple[int, int], name: str) -> None:
    student, teacher = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 3) for _ in range(2))
    step = gpu_variant(name, teacher)
    check_gpu(step, student, teacher)
    limit = copy_bytes_per_s(student, ROUNDS)

    def once(logits: Logits) -> None:
        step(logits)
        torch.cuda.synchronize()

    def prepare() -> tuple[tuple[Logits], dict[str, Any]]:
        logits = under_autograd(student)
        torch.cuda.synchronize()
        return (logits,), {}

    benchmark.pedantic(once, setup=prepare, rounds=ROUNDS, warmup_rounds=1)
    bytes_per_s = 3 * student.nbytes / benchmark.stats.stats.median
    benchmark.extra_info.update(
        bandwidth_gb_s=bytes_per_s / 1e9,
        copy_gb_s=limit / 1e9,
        share_of_copy=bytes_per_s / limit,
        peak_extra_bytes=peak_extra_bytes(functools.partial(step, prepare()[0][0])),
    )
