"""The Triton kernel against the float64 reference: on a GPU if there is one, else by Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pykd.kernels.kl_div import kl_div
from pykd.ops.kl_div import DIRECTION_CODES, Options
from pykd.ops.kl_div_reference import DIRECTIONS, kl_div_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")

# The interpreter computes both sides of tl.where with NumPy, which warns about -inf - -inf where the kernel selects 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


def launch(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: Options, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    inputs = [None if x is None else x.to(DEVICE) for x in (student, teacher, labels, scale)]
    losses = torch.full((student.shape[0],), math.nan, device=DEVICE)
    gradient = inputs[0] if in_place else torch.full(student.shape, math.nan, dtype=student.dtype, device=DEVICE)
    numbers = options._asdict() | {"direction": DIRECTION_CODES[options.direction]}
    kl_div(*inputs, losses, gradient, **numbers)
    assert gradient is not None
    return losses.cpu(), gradient.cpu()


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, options: Options) -> None:
    losses, gradient = launch(student, teacher, labels, scale, options)
    want_losses, want = kl_div_reference(student.double(), teacher.double(), labels, scale.double(), *options)
    torch.testing.assert_close(losses.double(), want_losses, rtol=2e-5, atol=2e-5, equal_nan=True)
    eps = torch.finfo(student.dtype).eps * (1 if DEVICE == "cuda" else 2)  # the interpreter truncates to bfloat16
    torch.testing.assert_close(gradient.double(), want, rtol=max(2e-5, 0.51 * eps), atol=4e-6, equal_nan=True)


def options(direction: str, temperature: float = 3.0, smoothing: float = 0.1) -> Options:
    return Options(temperature, direction, 0.3, 2.0, 0.7, smoothing)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rows", "student_classes", "teacher_classes"), [(1, 1, 1), (3, 7, 7), (2, 4500, 4203)])
def test_matches_the_reference(
    direction: str, temperature: float, rows: int, student_classes: int, teacher_classes: int
) -> None:
    student, teacher = torch.randn(rows, student_classes) * 3, torch.randn(rows, teacher_classes) * 3
    chosen = options(direction, temperature)
    check(student, teacher, torch.randint(0, student_classes, (rows,)), torch.rand(rows) + 0.5, chosen)
    check(student, teacher, None, torch.rand(rows) + 0.5, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_strides(dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(6, 90).to(dtype)[::2, 5:70] for _ in range(2))
    check(student, teacher.float(), torch.tensor([0, 64, 3]), torch.ones(3), options("forward"))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_minus_infinity_nan_and_skipped_rows(direction: str) -> None:
    student, teacher = torch.randn(8, 40), torch.randn(8, 40)
    student[0, 3:9] = teacher[0, 3:9] = -INF
    student[1, 3] = -INF
    teacher[2, 3] = -INF
    student[3] = -INF
    teacher[4] = -INF
    student[5, 7] = math.nan
    teacher[6, 7] = math.nan
    student[7] = math.nan
    scale = torch.ones(8)
    scale[7] = 0
    check(student, teacher, torch.full((8,), 20), scale, options(direction, smoothing=0.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_in_place(direction: str) -> None:
    student, teacher, labels = torch.randn(3, 50), torch.randn(3, 50), torch.tensor([0, 9, 49])
    want = launch(student, teacher, labels, torch.ones(3), options(direction))
    got = launch(student.clone(), teacher, labels, torch.ones(3), options(direction), in_place=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_without_gradient_and_without_rows() -> None:
    student, teacher, chosen = torch.randn(3, 50), torch.randn(3, 50), options("forward")
    numbers = chosen._asdict() | {"direction": 0}
    losses = torch.empty(3, device=DEVICE)
    kl_div(student.to(DEVICE), teacher.to(DEVICE), None, torch.ones(3, device=DEVICE), losses, None, **numbers)
    torch.testing.assert_close(losses.cpu(), launch(student, teacher, None, torch.ones(3), chosen)[0])
    empty = [torch.empty(0, 50, device=DEVICE) for _ in range(2)]
    kl_div(*empty, None, torch.empty(0, device=DEVICE), losses[:0], None, **numbers)
