"""Sparse linear layers beside the dense and sparse ones a user would pick instead, with weights rotated out of cache.

Each case is checked against float64 first. `extra_info` of every result holds the bytes of its weight and the bandwidth
they imply. A second test prints the ratios of interleaved rounds, which load on the machine moves far less than times.
PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.nn.codecs.bitmask import pack
from pykd.ops.bitmask import PackedSparse
from pykd.ops.sparse_linear import sparse_linear
from pykd.ops.sparse_route import route

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(96, 64)] if SMALL else [(3072, 768), (768, 3072), (4096, 4096)]
SPARSITIES = [0.8] if SMALL else [0.15, 0.3, 0.5, 0.8, 0.9, 0.95]
ROWS = [1, 16] if SMALL else [1, 16, 128]
ROTATION_BYTES = 1 << 12 if SMALL else 96 << 20  # dense bytes of all layers that take turns
ROUNDS = 1 if SMALL else 9
PEERS = ["pykd", "pykd bf16", "torch dense fp32", "torch dense bf16", "torch CSR", "ONNX Runtime dense fp32"]


class Case:
    """Layers of one shape and sparsity, as every peer wants them, made when first asked for."""

    def __init__(self, out: int, columns: int, sparsity: float, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = max(2, ROTATION_BYTES // (4 * out * columns))
        self.rows, self.x = rows, torch.randn(rows, columns, generator=generator)
        mask = torch.rand(out, columns, generator=generator) >= sparsity
        self.dense = [torch.randn(out, columns, generator=generator) * mask for _ in range(self.layers)]

    def call(self, peer: str) -> tuple[Callable[[int], Any], int]:
        """The peer as a function of the turn, and the bytes of one of its weights."""
        x, dense, turn = self.x, self.dense, lambda i: i % self.layers
        if peer.startswith("pykd"):
            dtype = torch.bfloat16 if peer == "pykd bf16" else torch.float32
            packed = [pack(weight.to(dtype)) for weight in dense]
            activations = x.to(dtype)
            size = packed[0].bitmask.numel() + packed[0].values.numel() * packed[0].values.element_size()
            return lambda i: sparse_linear(activations, packed[turn(i)]), size
        if peer == "torch dense fp32":
            return lambda i: F.linear(x, dense[turn(i)]), dense[0].numel() * 4
        if peer == "torch dense bf16":
            halves, activations = [weight.bfloat16() for weight in dense], x.bfloat16()
            return lambda i: F.linear(activations, halves[turn(i)]), dense[0].numel() * 2
        if peer == "torch CSR":
            csr, columns = [weight.to_sparse_csr() for weight in dense], x.T.contiguous()
            return lambda i: (csr[turn(i)] @ columns).T, int(csr[0].values().numel()) * 8
        sessions, feed = [_onnx_session(weight) for weight in dense], {"x": x.numpy()}
        return lambda i: sessions[turn(i)].run(None, feed)[0], dense[0].numel() * 4


def _onnx_session(weight: Tensor) -> Any:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T.numpy()), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, [None, weight.shape[1]])],
        [value("y", onnx.TensorProto.FLOAT, [None, weight.shape[0]])],
        [tensor],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(case: Case, call: Callable[[int], Any], peer: str) -> None:
    """The first layer's result against float64, within the rounding of the peer's element type."""
    got = torch.as_tensor(call(0)).double()
    want = F.linear(case.x.double(), case.dense[0].double())
    scale = F.linear(case.x.double().abs(), case.dense[0].double().abs()) + 1e-9
    error = float(((got - want).abs() / scale).max())
    assert error < (2e-2 if "bf16" in peer else 1e-5), f"{peer}: relative error {error:.1e}"


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sparse_linear(benchmark: Any, shape: tuple[int, int], sparsity: float, rows: int, peer: str) -> None:
    if peer == "torch dense bf16" and rows > 16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("torch emulates bf16 on this CPU: seconds a call at many rows")
    case = Case(*shape, sparsity, rows)
    with torch.inference_mode():
        call, size_bytes = case.call(peer)
        check(case, call, peer)
        for i in range(case.layers):  # layouts are made at the first call of each layer
            call(i)
        turn = iter(range(1 << 62))
        benchmark.pedantic(lambda: call(next(turn)), rounds=ROUNDS, warmup_rounds=1)
    median_s = benchmark.stats.stats.median
    route_taken = route(1 - sparsity, rows, *shape) if peer.startswith("pykd") else peer
    benchmark.extra_info.update(
        weight_bytes=size_bytes,
        bandwidth_gb_s=size_bytes / median_s / 1e9,
        route=route_taken,
        threads=torch.get_num_threads(),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: how many times faster pykd is than each fp32 peer (median of the rounds' ratios)."""
    peers = ["torch dense fp32", "torch CSR", "ONNX Runtime dense fp32"]
    lines = ["", f"{shape[0]} x {shape[1]}, fp32, {torch.get_num_threads()} threads: times faster than"]
    lines.append(f"{'sparsity':>9}{'rows':>6}{'pykd us':>9}" + "".join(f"{peer:>25}" for peer in peers))
    with torch.inference_mode():
        for sparsity in SPARSITIES:
            for rows in ROWS:
                case = Case(*shape, sparsity, rows)
                calls = [case.call(peer)[0] for peer in ["pykd", *peers]]
                rounds = interleave(calls, case.layers)
                ratios = [statistics.median(r[1 + i] / r[0] for r in rounds) for i in range(len(peers))]
                best_us = min(r[0] for r in rounds) * 1e6
                lines.append(f"{sparsity:9.2f}{rows:6}{best_us:9.0f}" + "".join(f"{ratio:25.2f}" for ratio in ratios))
    with capsys.disabled():
        print("\n".join(lines))


def interleave(calls: list[Callable[[int], Any]], layers: int) -> list[list[float]]:
    """Seconds of each call, for every round; each call in turn runs once a round, on the round's layer."""
    for call in calls:
        for i in range(layers):
            call(i)
    rounds = []
    for i in range(2 if SMALL else 21):
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call(i)
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return rounds


def test_packed_size() -> None:
    """Share of the dense fp32 bytes that a packed layer takes: the numbers that the saved file follows."""
    weight = torch.randn(512, 768)
    for sparsity, most in ((0.15, 0.89), (0.5, 0.54), (0.9, 0.14)):
        packed: PackedSparse = pack(weight, torch.rand(512, 768) >= sparsity)
        share = (packed.bitmask.numel() + packed.values.numel() * 4) / (weight.numel() * 4)
        assert share <= most, f"{sparsity:.0%} pruned takes {share:.3f} of dense"
