"""The op kl_div on NVIDIA GPUs: the choice of a kernel anywhere; every kernel against float64 where there is a GPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pykd.ops import kl_div_gpu as gpu
from pykd.ops.dispatch import DTYPE_CODES, TABLE, cuda_library_path
from pykd.ops.kl_div import Options
from pykd.ops.kl_div_reference import DIRECTIONS, kl_div_reference

INF = float("inf")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAUNCHERS = {"cuda": gpu.launch_cuda, "triton": gpu.launch_triton}
CLASSES = [1000, 32_000, 65_537, 128_256, 151_936]  # 65537: rows begin at every alignment of the element


@pytest.mark.parametrize(
    ("classes", "types", "capability", "triton", "cuda", "want"),
    [
        (65_537, (BF16, BF16), (9, 0), True, True, "cuda"),
        (128_256, (F32, F32), (10, 0), True, True, "cuda"),
        (65_536, (BF16, BF16), (9, 0), True, True, "triton"),
        (128_256, (BF16, BF16), (8, 0), True, True, "triton"),
        (128_256, (BF16, F32), (9, 0), True, True, "triton"),
        (128_256, (BF16, BF16), (9, 0), True, False, "triton"),
        (1000, (BF16, F16), (8, 0), False, True, "cuda"),
        (1000, (F32, F32), (9, 0), False, False, "reference"),
        (128_256, (torch.float64, F32), (9, 0), True, True, "reference"),
        (1000, (F32, torch.float64), (9, 0), True, True, "reference"),
    ],
)
def test_choice_is_a_function_of_sizes_types_and_capability(
    classes: int,
    types: tuple[torch.dtype, torch.dtype],
    capability: tuple[int, int],
    triton: bool,
    cuda: bool,
    want: str,
) -> None:
    assert gpu.choose(classes, *types, capability, triton=triton, cuda=cuda) == want


def test_every_choice_is_a_declared_route() -> None:
    routes = [route for route in TABLE if (route.op, route.device) == ("kl_div", "cuda")]
    assert [route.implementation for route in routes] == ["cuda", "triton", "cuda", "reference"]
    assert f"more than {gpu.WIDE_CLASSES} classes" in routes[0].when


@pytest.mark.skipif(cuda_library_path() is None, reason="the CUDA library is not built")
@pytest.mark.parametrize(
    ("classes", "dtype", "teacher_dtype", "capability", "blocks"),
    [
        (16_383, BF16, BF16, 90, 0),
        (32_768, BF16, BF16, 90, 2),
        (65_537, BF16, BF16, 90, 4),
        (128_256, F16, F16, 90, 8),
        (152_064, BF16, BF16, 90, 8),
        (128_256, F32, F32, 90, 16),
        (262_144, BF16, BF16, 100, 16),
        (1_000_000, BF16, BF16, 90, 0),  # more than 16 blocks hold
        (128_256, F32, F32, 120, 0),  # 99 KB a block and clusters of 8 do not hold it
        (128_256, BF16, F32, 90, 0),
        (128_256, BF16, BF16, 89, 0),
    ],
)
def test_blocks_per_row(
    classes: int, dtype: torch.dtype, teacher_dtype: torch.dtype, capability: int, blocks: int
) -> None:
    library = ctypes.CDLL(str(cuda_library_path()))
    codes = [ctypes.c_int(code) for code in (DTYPE_CODES[dtype], DTYPE_CODES[teacher_dtype], capability)]
    assert library.pykd_cuda_kl_div_blocks(ctypes.c_int64(classes), *codes) == blocks


def options(direction: str, temperature: float = 3.0, smoothing: float = 0.1) -> Options:
    return Options(temperature, direction, 0.3, 2.0, 0.7, smoothing)


def launch(
    name: str, student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, chosen: Options
) -> tuple[Tensor, Tensor]:
    gradient = torch.full(student.shape, math.nan, dtype=student.dtype, device="cuda")
    return gpu.run(LAUNCHERS[name], student, teacher, labels, scale, gradient, chosen), gradient


def check(name: str, student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor, chosen: Options) -> None:
    losses, gradient = launch(name, student, teacher, labels, scale, chosen)
    want_losses, want = kl_div_reference(student.double(), teacher.double(), labels, scale.double(), *chosen)
    torch.testing.assert_close(losses.double(), want_losses, rtol=2e-5, atol=2e-5, equal_nan=True)
    relative = max(2e-5, 0.51 * torch.finfo(student.dtype).eps)
    torch.testing.assert_close(gradient.double(), want, rtol=relative, atol=4e-6, equal_nan=True)


def case(rows: int, classes: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    student, teacher = (torch.randn(rows, classes, device="cuda") * 3 for _ in range(2))
    labels = torch.randint(0, classes, (rows,), device="cuda")
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels, torch.rand(rows, device="cuda") + 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", CLASSES)
def test_on_a_gpu(classes: int, direction: str, dtype: torch.dtype, name: str) -> None:
    student, teacher, labels, scale = case(9, classes, dtype)
    scale[4] = 0
    labels[0], labels[1] = 0, classes - 1
    for temperature, smoothing in ((3.0, 0.1), (1.0, 0.0)):
        chosen = options(direction, temperature, smoothing)
        check(name, student, teacher, labels, scale, chosen)
        check(name, student, teacher, None, scale, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("student_classes", "teacher_classes"), [(151_936, 152_064), (70_003, 66_001), (40, 70_001)])
def test_vocabularies_of_different_size_and_strides(
    direction: str, student_classes: int, teacher_classes: int, name: str
) -> None:
    for dtype, shift in ((BF16, 0), (F32, 1)):
        student = torch.randn(5, student_classes + 5, device="cuda").to(dtype)[:, shift : student_classes + shift]
        teacher = torch.randn(5, teacher_classes + 8, device="cuda").to(dtype)[:, shift : teacher_classes + shift]
        labels = torch.tensor([0, 39, 20, 7, 1], device="cuda")
        check(name, student, teacher, labels, torch.ones(5, device="cuda"), options(direction, smoothing=0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", [1000, 70_001])
def test_minus_infinity_nan_and_skipped_rows_on_a_gpu(classes: int, direction: str, name: str) -> None:
    student, teacher, labels, scale = case(10, classes, F32)
    student[0, 3:900] = teacher[0, 3:900] = -INF
    student[1, 3] = teacher[2, 3] = -INF
    student[3], teacher[4] = -INF, -INF
    student[5, classes - 7] = teacher[6, 7] = math.nan
    student[7] = math.nan
    scale[7] = 0
    student[8] += 1e4
    teacher[8] -= 1e4
    student[9, : classes // 2] = teacher[9, : classes // 2] = -INF  # whole blocks of a cluster without a logit
    labels[:] = classes - 1
    check(name, student, teacher, labels, scale, options(direction, smoothing=0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("types", [(BF16, F32), (F32, F16), (F16, BF16)], ids=str)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_mixed_types_on_a_gpu(name: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for classes in (999, 70_000):
        check(name, *case(5, classes, *types), options("jsd"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", [1000, 65_537, 128_256])
def test_in_place_on_a_gpu(classes: int, direction: str, name: str) -> None:
    student, teacher, labels, scale = case(300, classes, BF16)
    want = launch(name, student, teacher, labels, scale, options(direction))
    losses = gpu.run(LAUNCHERS[name], student, teacher, labels, scale, student, options(direction))
    torch.testing.assert_close((losses, student), want, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_gradient_on_a_gpu(direction: str, name: str) -> None:
    for classes in (1000, 128_256):
        inputs = case(5, classes, BF16)
        losses = gpu.run(LAUNCHERS[name], *inputs, None, options(direction))
        torch.testing.assert_close(losses, launch(name, *inputs, options(direction))[0], rtol=1e-6, atol=1e-6)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [1000, 128_256])
def test_the_host_never_waits(classes: int, no_waiting: None) -> None:
    student, teacher, labels, scale = case(4, classes, BF16)
    student.requires_grad_()
    losses, _ = torch.ops.pykd.kl_div(student, teacher, labels, scale, True, *options("forward"))
    losses.sum().backward()
    torch.ops.pykd.kl_div_(student.detach().clone(), teacher, labels, scale, *options("reverse"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("classes", [1000, 128_256])
def test_captured_in_a_graph_and_replayed(classes: int, name: str) -> None:
    inputs = case(4, classes, BF16)
    launch(name, *inputs, options("jsd"))  # compiles and loads outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradient = launch(name, *inputs, options("jsd"))
    for tensor, fresh in zip(inputs, case(4, classes, BF16), strict=True):
        tensor.copy_(fresh)
    graph.replay()
    want = launch(name, *inputs, options("jsd"))
    torch.testing.assert_close((losses, gradient), want, rtol=0, atol=0)


@pytest.mark.gpu(gigabytes=14)
@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_more_than_2_to_the_31_elements(name: str) -> None:
    rows, classes = 14_500, 151_936
    student, teacher = (torch.empty(rows, classes, dtype=BF16, device="cuda").normal_() for _ in range(2))
    labels = torch.arange(rows, device="cuda")
    last = [x[-2:].clone() for x in (student, teacher)]
    scale = torch.ones(rows, device="cuda")
    losses = gpu.run(LAUNCHERS[name], student, teacher, labels, scale, student, options("forward"))
    want = kl_div_reference(*(x.double() for x in last), labels[-2:], scale[-2:].double(), *options("forward"))
    torch.testing.assert_close(losses[-2:].double(), want[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(student[-2:].double(), want[1], rtol=4.1e-3, atol=4e-6)
