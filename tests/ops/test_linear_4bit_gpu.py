"""linear_4bit on NVIDIA GPUs: Triton's kernels, interpreted where there is no GPU; every kernel against float64 on one."""

from __future__ import annotations

import pytest
import torch

from pykd.ops.dispatch import cuda_library
from pykd.ops.int4_r16 import CODES, codebook
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_4bit_gpu import launch

from .test_linear_4bit import SHAPES, assert_close, make


@pytest.mark.parametrize("code", ["int4", "uint4", "nf4"])
@pytest.mark.parametrize("shape", [(40, 67, 32), (33, 100, 20), (70, 64, 1000)], ids=str)
def test_triton_kernel(shape: tuple[int, int, int], code: str) -> None:
    from pykd.kernels import linear_4bit as kernel

    out, features, group = shape
    tensors, _, weight = make(out, features, group, code)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter runs on CPU tensors
    table = codebook(code, torch.device(device))
    qweight, scales, zeros = (None if t is None else t.to(device) for t in tensors)
    for rows, dtype in ((0, torch.float32), (1, torch.float32), (21, torch.bfloat16), (70, torch.float16)):
        x, bias = torch.randn(rows, features).to(dtype), torch.randn(out) if rows == 21 else None
        shipped = None if bias is None else bias.to(device)
        y = kernel.linear_4bit(x.to(device), qweight, scales, zeros, table, shipped, code=code, group_size=group)
        assert_close(y.cpu(), x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape: tuple[int, int, int], code: str) -> None:
    out, features, group = shape
    tensors, _, weight = make(out, features, group, code)
    qweight, scales, zeros = (None if t is None else t.cuda() for t in tensors)
    for rows in (0, 1, 2, 5, 8, 9, 100):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, bias = torch.randn(rows, features).to(dtype), torch.randn(out)
            y = linear_4bit(x.cuda(), qweight, scales, zeros=zeros, bias=bias.cuda(), code=code, group_size=group)
            assert_close(y.cpu(), x, weight, bias)
            native_y = launch(
                cuda_library(), x.cuda(), qweight, scales, zeros, codebook(code, y.device), None, code, group
            )
            assert_close(native_y.cpu(), x, weight, None)


@pytest.mark.gpu
def test_gpu_calls_can_be_captured_in_a_graph() -> None:
    tensors, _, _ = make(64, 128, 32, "int4")
    x, qweight, scales = torch.randn(1, 128).cuda(), tensors.qweight.cuda(), tensors.scales.cuda()
    want = linear_4bit(x, qweight, scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_4bit(x, qweight, scales)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)
