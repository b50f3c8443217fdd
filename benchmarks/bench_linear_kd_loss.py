"""linear_kd_loss, forward and backward, beside the unfused kd_loss, torch eager and torch.compile: time and memory.

Every variant's loss and gradients are checked against float64 first. Memory is the growth of the largest resident set
of a fresh process from before the step to its end, less the gradients that the step returns; time is taken in
interleaved rounds of one process. PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import Heads
from loss_timing import seconds
from torch import Tensor

import pykd

SMALL = os.environ.get("PYKD_BENCH") == "small"
#: positions, features, classes
SHAPES = [(64, 32, 1000)] if SMALL else [(2048, 256, 32_000), (2048, 1024, 151_936)]
ROUNDS = 1 if SMALL else 3
TEMPERATURE, ALPHA = 4.0, 0.5
NAMES = ["pykd linear_kd_loss", "pykd kd_loss in place", "pykd kd_loss", "torch eager", "torch compile"]

Step = Callable[[], tuple[Tensor, ...]]


def torch_loss(hidden: Tensor, weight: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """The loss as users of torch write it; `wanted` are the teacher's logits."""
    student = F.linear(hidden, weight)
    logs = [(x / TEMPERATURE).log_softmax(-1) for x in (student, wanted)]
    soft = F.kl_div(*logs, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


class Case(Heads):
    """Every variant as a step to (loss, gradients of hidden and weight)."""

    def __init__(self, positions: int, features: int, classes: int) -> None:
        super().__init__(positions, features, classes)
        self.compiled: Any = torch.compile(torch_loss, fullgraph=True, dynamic=False)

    def loss(self, name: str) -> Tensor:
        if name == "pykd linear_kd_loss":
            return pykd.linear_kd_loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels,
                                       temperature=TEMPERATURE, alpha=ALPHA)  # fmt: skip
        wanted = F.linear(self.teacher_hidden, self.teacher_weight)
        if name.startswith("torch"):
            return (self.compiled if "compile" in name else torch_loss)(self.hidden, self.weight, wanted, self.labels)
        return pykd.kd_loss(F.linear(self.hidden, self.weight), wanted, self.labels, temperature=TEMPERATURE,
                            alpha=ALPHA, inplace="in place" in name)  # fmt: skip

    def step(self, name: str) -> Step:
        return lambda: self.differentiated(self.loss(name))

    def truth(self, rows: int) -> Tensor:
        """The gradient of the first hidden states in float64."""
        hidden = self.hidden[:rows].detach().double().requires_grad_()
        wanted = F.linear(self.teacher_hidden[:rows].double(), self.teacher_weight.double())
        loss = torch_loss(hidden, self.weight.detach().double(), wanted, self.labels[:rows])
        return torch.autograd.grad(loss, hidden)[0] * rows / len(self.hidden)

    def check(self) -> None:
        """A few rows of every variant's hidden gradient against float64, losses and weight gradients to each other."""
        want, first = self.truth(8), None
        for name in NAMES:
            got = self.step(name)()
            error = float((got[1][:8].double() - want).abs().max() / want.abs().max())
            assert error < 1e-4, f"{name}: relative error {error:.1e}"
            first = first or got
            torch.testing.assert_close(got, first, rtol=1e-3, atol=1e-5 * float(first[2].abs().max()))


def extra_bytes(shape: tuple[int, int, int], name: str) -> int:
    """Growth of the largest resident set over one step in a fresh process, less the gradients returned."""
    command = [sys.executable, __file__, *map(str, shape), name]
    # Without the pool, whose memory of the preparation would count as there before the step.
    environment = {**os.environ, "PYKD_POOL_BYTES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def measure(shape: tuple[int, int, int], name: str) -> int:
    """What `extra_bytes` runs: compilation and a first small call come before the count."""
    warm = Case(16, shape[1], shape[2])
    warm.step(name)()
    del warm
    case = Case(*shape)
    ctypes.CDLL(None).malloc_trim(0)  # what the preparation has freed would be used again, uncounted
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is from now on
    before = resident_bytes("VmRSS")
    case.step(name)()
    return resident_bytes("VmHWM") - before - case.hidden.nbytes - case.weight.nbytes


def resident_bytes(kind: str) -> int:
    """What Linux says of this process: "VmRSS" now, "VmHWM" the largest so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: each variant's time over linear_kd_loss's, and its memory over that."""
    memory = [0 if SMALL else extra_bytes(shape, name) for name in NAMES]
    case = Case(*shape)
    case.check()
    steps = [case.step(name) for name in NAMES]
    rounds = [[seconds(step) for step in steps] for _ in range(ROUNDS)]
    flops = 8 * shape[0] * shape[1] * shape[2]  # two logits, two gradients, 2 each
    where = f"{torch.get_num_threads()} threads, {pykd.build_info()['isa']}"
    lines = ["", f"linear_kd_loss {' x '.join(map(str, shape))}, float32, {where}"]
    lines.append(f"{'':24}{'ms':>9}{'GFLOP/s':>9}{'x time':>8}{'extra MB':>10}{'x memory':>10}")
    for i, name in enumerate(NAMES):
        ratio = statistics.median(r[i] / r[0] for r in rounds)
        median_s = statistics.median(r[i] for r in rounds)
        share = f"{memory[i] / 1e6:10.0f}{memory[i] / memory[0]:10.1f}" if memory[0] else f"{'-':>10}{'-':>10}"
        lines.append(f"{name:24}{median_s * 1e3:9.1f}{flops / median_s / 1e9:9.1f}{ratio:8.2f}{share}")
    with capsys.disabled():
        print("\n".join(lines))


if __name__ == "__main__":
    print(measure((int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), sys.argv[4]))
