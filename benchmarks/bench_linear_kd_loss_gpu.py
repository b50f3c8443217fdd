"""linear_kd_loss, forward and backward, on an NVIDIA GPU in bf16 beside Liger's chunked distillation and torch.compile.

The loss is what Liger chunks: Jensen-Shannon between the softened distributions without T squared, and cross entropy,
half of each. torch.compile runs the same chunks under activation checkpointing. pykd runs with its own budget, and with
chunks of as many positions as theirs. Every variant's gradients are checked against float64 first. `extra_info` holds
the arithmetic rate that four products imply and the most memory beside inputs and returned gradients. Liger is measured
where it is installed. PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import peak_extra_bytes
from heads import Heads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pykd

SMALL = os.environ.get("PYKD_BENCH") == "small"
#: positions, features, classes
SHAPES = [(64, 32, 1000)] if SMALL else [(4096, 2048, 128_256)]
ROUNDS = 1 if SMALL else 7
TEMPERATURE = 2.0
CHUNK = 16 if SMALL else 1024  # positions, as Liger has them
NAMES = ["pykd linear_kd_loss", "pykd linear_kd_loss equal chunks", "pykd kd_loss in place", "torch compile chunked"]
if importlib.util.find_spec("liger_kernel") is not None:  # a peer that pykd does not install: pip install liger-kernel
    NAMES.append("liger chunked")


def torch_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    """The sum over positions, as users of torch write it: in float32, or in float64 for float64 input."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student, teacher = F.linear(hidden, weight).to(wide), F.linear(teacher_hidden, teacher_weight).to(wide)
    log_p, log_q = ((x / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    soft = (F.kl_div(log_m, log_p, log_target=True, reduction="sum") +
            F.kl_div(log_m, log_q, log_target=True, reduction="sum")) / 2  # fmt: skip
    return (soft + F.cross_entropy(student, labels, reduction="sum")) / 2


class Case(Heads):
    """Every variant as a step to (loss, gradients of hidden and weight)."""

    def __init__(self, positions: int, features: int, classes: int, device: str) -> None:
        super().__init__(positions, features, classes, device=device, dtype=torch.bfloat16)
        self.compiled: Any = torch.compile(torch_loss, fullgraph=True, dynamic=False)

    def loss(self, name: str) -> Tensor:
        heads = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        options: dict[str, Any] = {"direction": "jsd", "temperature": TEMPERATURE, "alpha": 0.5, "scale_t2": False}
        if name.startswith("pykd linear"):
            equal = {"chunk_bytes": 2 * CHUNK * len(self.weight) * self.weight.element_size()}
            return pykd.linear_kd_loss(*heads, self.labels, **options, **(equal if "equal" in name else {}))
        if name.startswith("pykd"):
            wanted = F.linear(self.teacher_hidden, self.teacher_weight)
            return pykd.kd_loss(F.linear(self.hidden, self.weight), wanted, self.labels, inplace=True, **options)
        if name == "liger chunked":
            package = importlib.import_module("liger_kernel.chunked_loss")
            loss = package.LigerFusedLinearJSDLoss(temperature=TEMPERATURE)
            result: Tensor = loss(*heads, self.labels, None, None)
            return result
        chunks = zip(*(x.split(CHUNK) for x in (self.hidden, self.teacher_hidden, self.labels)), strict=True)
        parts = [
            checkpoint(self.compiled, hidden, self.weight, teacher, self.teacher_weight, labels, use_reentrant=False)
            for hidden, teacher, labels in chunks
        ]
        return torch.stack(parts).sum() / len(self.hidden)

    def step(self, name: str) -> tuple[Tensor, ...]:
        return self.differentiated(self.loss(name))

    def check(self, name: str) -> None:
        """The hidden gradient of a few positions against float64, within what logits in bfloat16 cost."""
        loss, hidden_gradient, weight_gradient = self.step(name)
        hidden = self.hidden[:8].detach().double().requires_grad_()
        fixed = (self.weight.detach().double(), self.teacher_hidden[:8].double(), self.teacher_weight.double())
        exact = torch_loss(hidden, *fixed, self.labels[:8]) / len(self.hidden)
        (want,) = torch.autograd.grad(exact, hidden)
        error = float((hidden_gradient[:8].double() - want).abs().max() / want.abs().max())
        assert error < 3e-2, f"{name}: relative error {error:.1e}"
        assert bool(loss.isfinite() and weight_gradient.isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_kd_loss_gpu(benchmark: Any, shape: tuple[int, int, int], name: str) -> None:
    case = Case(*shape, "cuda")
    case.check(name)

    def once() -> None:
        case.step(name)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
    flops = 8 * shape[0] * shape[1] * shape[2]  # two logits, two gradients, 2 each
    benchmark.extra_info.update(
        tflop_s=flops / benchmark.stats.stats.median / 1e12,
        extra_bytes=peak_extra_bytes(lambda: case.step(name)) - case.hidden.nbytes - case.weight.nbytes,
    )
