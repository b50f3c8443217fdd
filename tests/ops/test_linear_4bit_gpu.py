"""linear_4bit on NVIDIA GPUs: Triton's kernels, interpreted where there is no GPU, the choice of a route, and every
kernel against float64 where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from pykd.kernels import linear_4bit as kernels
from pykd.ops import linear_4bit_gpu as gpu
from pykd.ops.activation import activate
from pykd.ops.dispatch import TABLE, cuda_library
from pykd.ops.int4_r16 import CODES, codebook_code, dequantize
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_4bit_gpu import FLOAT32_ROWS, TENSOR_CORE_ROWS, Weight, launch

from .test_linear_4bit import SHAPES, assert_close, make

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter runs on CPU tensors
OWN = codebook_code([value / 10 - 0.7 for value in range(16)])


def shipped(tensors: Iterable[Tensor | None], device: str = DEVICE) -> Any:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def written(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 weight in `dtype` as Triton writes it: to the nearest, but its interpreter cuts bfloat16 off."""
    if dtype == BF16 and DEVICE == "cpu":
        weight = (weight.view(torch.int32) >> 16 << 16).view(F32)
    return weight.to(dtype)


@pytest.mark.parametrize("code", ["int4", "uint4", "nf4"])
@pytest.mark.parametrize("shape", [(40, 67, 32), (33, 100, 20), (70, 64, 1000)], ids=str)
def test_triton_kernel(shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    tensors, _, weight = make(out, features, group, code)
    packed = Weight.of(*shipped(tensors), code, group)
    for rows, dtype in ((0, torch.float32), (1, torch.float32), (21, torch.bfloat16), (70, torch.float16)):
        x, bias = torch.randn(rows, features).to(dtype), torch.randn(out) if rows == 21 else None
        y = kernels.linear_4bit(*shipped((x,)), packed, *shipped((bias,)))
        assert_close(y.cpu(), x, weight, bias)


@pytest.mark.parametrize("code", [*sorted(CODES), OWN])
@pytest.mark.parametrize("shape", [(40, 67, 32), (33, 101, 20), (70, 200, 64), (65, 130, 128), (3, 70, 1000)], ids=str)
def test_the_weight_written_out_is_the_dequantized_one(shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    tensors, _, _ = make(out, features, group, code)
    for dtype, kind in ((F32, F16), (F16, F32), (BF16, BF16)):
        scales = tensors.scales.to(kind) * 1.01
        want = dequantize(tensors.qweight, scales, tensors.zeros, code=code, in_features=features, group_size=group)
        packed = Weight.of(*shipped((tensors.qweight, scales, tensors.zeros)), code, group)
        got = kernels.dequantize(packed, features, dtype)
        assert got.shape == (out, features) and torch.equal(got.cpu(), written(want, dtype)), (code, dtype)
    none = Weight.of(*(None if t is None else t[:0] for t in packed[:3]), code, group)
    assert kernels.dequantize(none, features, F16).shape == (0, features)


@pytest.mark.parametrize(
    ("rows", "dtype", "code", "group", "library", "triton", "want"),
    [
        (8, BF16, "int4", 64, True, True, "cuda"),
        (8, BF16, "int4", 64, False, True, "triton"),
        (9, BF16, "int4", 64, True, True, "triton"),
        (TENSOR_CORE_ROWS, BF16, "uint4", 64, True, True, "triton"),
        (TENSOR_CORE_ROWS + 1, BF16, "uint4", 64, True, True, "dense"),
        (TENSOR_CORE_ROWS + 1, F16, "int4", 32, False, True, "dense"),
        (FLOAT32_ROWS, F32, "int4", 64, True, True, "triton"),
        (FLOAT32_ROWS + 1, F32, "int4", 64, True, True, "dense"),
        (FLOAT32_ROWS, BF16, "nf4", 64, True, True, "triton"),
        (FLOAT32_ROWS + 1, BF16, "nf4", 64, True, True, "dense"),
        (FLOAT32_ROWS + 1, F16, OWN, 64, False, True, "dense"),
        (FLOAT32_ROWS + 1, BF16, "int4", 20, True, True, "dense"),
        (FLOAT32_ROWS + 1, BF16, "int4", 96, True, True, "triton"),
        (10_000, BF16, "int4", 64, True, False, "cuda"),
    ],
)
def test_choice_is_a_function_of_rows_type_and_code(
    rows: int, dtype: torch.dtype, code: str, group: int, library: bool, triton: bool, want: str
) -> None:
    assert gpu.choose(rows, dtype, code, group, library=library, triton=triton) == want


def test_the_table_shows_the_routes() -> None:
    routes = [route for route in TABLE if (route.op, route.device) == ("linear_4bit", "cuda")]
    assert [route.implementation.split(" ")[0] for route in routes[:3]] == ["CUDA", "Triton,", "Triton"]
    assert f"9-{TENSOR_CORE_ROWS} rows; 9-{FLOAT32_ROWS} for codebooks" in routes[1].when
    assert "cuBLAS" in routes[2].implementation


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which calls of `gpu.cuda`, without the CUDA library, write weights out."""
    seen: list[torch.dtype] = []
    original: Callable[..., Tensor] = kernels.dequantize

    def dequantize(weight: Weight, in_features: int, dtype: torch.dtype) -> Tensor:
        seen.append(dtype)
        return original(weight, in_features, dtype)

    monkeypatch.setattr(kernels, "dequantize", dequantize)
    monkeypatch.setattr(gpu, "cuda_library", lambda: None)
    return seen


@pytest.mark.parametrize(
    ("dtype", "code", "shape", "limit"),
    [
        (F16, "uint4", (33, 100, 32), TENSOR_CORE_ROWS),
        (F16, "nf4", (33, 101, 64), FLOAT32_ROWS),
        (F32, "int4", (70, 67, 32), FLOAT32_ROWS),
        (F32, "uint4", (40, 65, 20), FLOAT32_ROWS),
    ],
)
def test_beyond_the_limit_the_weight_is_written_out(
    dtype: torch.dtype, code: str, shape: tuple[int, int, int], limit: int, writes: list[torch.dtype]
) -> None:
    out, features, group = shape
    tensors, _, weight = make(out, features, group, code)
    bias = torch.randn(out)
    for rows in (limit, limit + 1):
        x = torch.randn(features, rows).to(dtype).t()
        y = gpu.cuda(*shipped((x, *tensors, bias)), code, out, group)
        assert writes == [dtype] * (rows - limit)
        assert_close(y.cpu(), x, weight, bias)


def test_a_written_weight_with_an_activation_in_more_dimensions_and_under_autocast(writes: list[torch.dtype]) -> None:
    tensors, _, weight = make(33, 64, 32, "nf4")
    x = torch.randn(2, FLOAT32_ROWS, 64)
    with torch.autocast(DEVICE, dtype=BF16):
        y = gpu.cuda(*shipped((x, *tensors, None)), "nf4", 33, 32, activation="silu")
    assert writes == [F32] and y.dtype == F32
    want = activate(x.double() @ weight.t(), "silu")
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_written_weight_is_that_of_a_dense_layer(writes: list[torch.dtype]) -> None:
    tensors, _, weight = make(33, 100, 20, "uint4")
    x, bias = torch.randn(FLOAT32_ROWS + 1, 100).bfloat16(), torch.randn(33)
    y = gpu.cuda(*shipped((x, *tensors, bias)), "uint4", 33, 20)
    assert writes == [BF16]
    assert_close(y.cpu(), x, written(weight.float(), BF16).double(), bias.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    tensors, _, weight = make(out, features, group, code)
    qweight, scales, zeros = shipped(tensors, "cuda")
    packed = Weight.of(qweight, scales, zeros, code, group)
    for rows in (0, 1, 2, 5, 8, 9, 100, 200):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, bias = torch.randn(rows, features).to(dtype), torch.randn(out)
            y = linear_4bit(x.cuda(), qweight, scales, zeros=zeros, bias=bias.cuda(), code=code, group_size=group)
            assert_close(y.cpu(), x, weight, bias)
            native_y = launch(cuda_library(), x.cuda(), packed, None)
            assert_close(native_y.cpu(), x, weight, None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, FLOAT32_ROWS, FLOAT32_ROWS + 1])
@pytest.mark.parametrize("code", ["int4", "nf4"])
def test_gpu_calls_can_be_captured_in_a_graph(code: str, rows: int) -> None:
    tensors, _, _ = make(64, 128, 32, code)
    x, qweight, scales = torch.randn(rows, 128).cuda(), tensors.qweight.cuda(), tensors.scales.cuda()
    want = linear_4bit(x, qweight, scales, code=code)  # compiles, and makes cuBLAS ready
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_4bit(x, qweight, scales, code=code)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)
