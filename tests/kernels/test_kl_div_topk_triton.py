"""The Triton kernel against the float64 reference: on a GPU if there is one, else by Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pykd.ops.kl_div_topk import Options
from pykd.ops.kl_div_topk_gpu import launch_triton
from pykd.ops.kl_div_topk_reference import kl_div_topk_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")

# The interpreter computes both sides of tl.where with NumPy, which warns about -inf - -inf where the kernel selects 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


def launch(student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor, options: Options,
           in_place: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs: Any = [None if x is None else x.to(DEVICE) for x in (student, ids, log_probs, labels, scale)]
    losses = torch.full((student.shape[0],), math.nan, device=DEVICE)
    gradient = inputs[0] if in_place else torch.full(student.shape, math.nan, dtype=student.dtype, device=DEVICE)
    launch_triton(*inputs, losses, gradient, options)
    return losses.cpu(), gradient.cpu()


def check(student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, scale: Tensor,
          options: Options) -> None:  # fmt: skip
    losses, gradient = launch(student, ids, log_probs, labels, scale, options)
    want_losses, want = kl_div_topk_reference(
        student.double(), ids, log_probs.double(), labels, scale.double(), *options
    )
    torch.testing.assert_close(losses.double(), want_losses, rtol=2e-5, atol=2e-5, equal_nan=True)
    eps = torch.finfo(student.dtype).eps * (1 if DEVICE == "cuda" else 2)  # the interpreter truncates to bfloat16
    torch.testing.assert_close(gradient.double(), want, rtol=max(2e-5, 0.51 * eps), atol=4e-6, equal_nan=True)


def options(temperature: float = 3.0, *, tail: bool = False, power: float = 1.0, smoothing: float = 0.1) -> Options:
    return Options(temperature, power, tail, 2.0, 0.7, smoothing)


def case(rows: int, classes: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, ids with repetitions and gaps, log-probabilities whose mass is below 1."""
    log_probs = torch.rand(rows, kept).log() - math.log(max(kept, 1))
    return torch.randn(rows, classes) * 3, torch.randint(-1, classes, (rows, kept)), log_probs


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("rows", "classes", "kept"), [(1, 1, 1), (3, 7, 9), (2, 4500, 33), (2, 60, 0)])
def test_matches_the_reference(tail: bool, temperature: float, rows: int, classes: int, kept: int) -> None:
    inputs = case(rows, classes, kept)
    check(*inputs, torch.randint(0, classes, (rows,)), torch.rand(rows) + 0.5, options(temperature, tail=tail))
    check(*inputs, None, torch.rand(rows) + 0.5, options(temperature, power=1.0 if tail else 0.4, tail=tail))


@pytest.mark.parametrize("tail", [False, True])
def test_every_class_kept_and_lists_longer_than_a_block(tail: bool) -> None:
    student, ids = torch.randn(1, 1030), torch.randperm(1030).unsqueeze(0)
    check(student, ids, torch.randn(1, 1030).log_softmax(-1), None, torch.ones(1), options(tail=tail))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_strides(dtype: torch.dtype) -> None:
    student, ids, log_probs = case(6, 90, 8)
    student = student.to(dtype)[::2, 5:70]
    check(student, ids[::2] % 65, log_probs.to(dtype)[::2], torch.tensor([0, 64, 3]), torch.ones(3), options(tail=True))


@pytest.mark.parametrize("tail", [False, True])
def test_large_logits_and_a_small_tail(tail: bool) -> None:
    student, ids, log_probs = case(3, 100, 4)
    student[0] += 1e4
    student[1] -= 1e4
    student[2].scatter_(0, ids[2].clamp(min=0), 500.0)
    check(student, ids.clamp(min=0), log_probs, None, torch.ones(3), options(1.0, tail=tail))


@pytest.mark.parametrize("tail", [False, True])
def test_minus_infinity_nan_and_skipped_rows(tail: bool) -> None:
    student, _, log_probs = case(9, 40, 3)
    ids = torch.tensor([5, 3, 30]).repeat(9, 1)
    student[0, 10:19] = -INF
    student[1, 3] = -INF
    log_probs[2, 1] = -INF
    student[3] = -INF
    ids[4] = -1
    student[5, 7] = math.nan
    log_probs[6, 1] = math.nan
    student[7] = math.nan
    ids[7, 2] = 1000
    student[8] = torch.full((40,), -INF).scatter(0, ids[8], 1.0)
    scale = torch.ones(9)
    scale[7] = 0
    check(student, ids, log_probs, torch.full((9,), 30), scale, options(tail=tail, smoothing=0.0))


@pytest.mark.parametrize("tail", [False, True])
def test_in_place(tail: bool) -> None:
    inputs, labels = case(3, 50, 5), torch.tensor([0, 9, 49])
    want = launch(*inputs, labels, torch.ones(3), options(tail=tail))
    got = launch(inputs[0].clone(), *inputs[1:], labels, torch.ones(3), options(tail=tail), in_place=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_teacher_of_weight_zero_does_not_count() -> None:
    student, ids, log_probs = case(3, 50, 5)
    check(
        student, ids, log_probs * math.nan, torch.tensor([0, 9, 49]), torch.ones(3), options()._replace(kl_weight=0.0)
    )


def test_without_gradient_and_without_rows() -> None:
    inputs = [x.to(DEVICE) for x in case(3, 50, 5)]
    losses = torch.empty(3, device=DEVICE)
    launch_triton(*inputs, None, torch.ones(3, device=DEVICE), losses, None, options())  # type: ignore[arg-type]
    want = launch(*inputs, None, torch.ones(3), options())  # type: ignore[arg-type]
    torch.testing.assert_close(losses.cpu(), want[0])
    empty = [x[:0] for x in inputs]
    launch_triton(*empty, None, torch.ones(0, device=DEVICE), losses[:0], None, options())  # type: ignore[arg-type]
