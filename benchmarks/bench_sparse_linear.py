"""Sparse linear layers beside the dense and sparse ones a user would pick instead, with weights rotated out of cache.

Each case is checked against float64 first. `extra_info` of every result holds the bytes of its weight and the bandwidth
they imply. `test_goals` prints what sparse layers are meant to reach beside what they reach in interleaved rounds,
which load on the machine moves far less than times; `test_auto` whether tuned layers lose to dense ones;
`test_file_sizes` how files shrink; `test_gpu_goals` one row on a GPU. PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.io.export.onnx_model import session_options
from pykd.nn import Linear4bit, Linear8bit, SparseLinear
from pykd.nn.codecs.bitmask import pack
from pykd.ops import int4_r16, int8_r16
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.linear_8bit import linear_8bit
from pykd.ops.sparse_linear import sparse_linear
from pykd.ops.sparse_route import route
from pykd.ops.sparse_tuning import measure

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(96, 64)] if SMALL else [(3072, 768), (768, 3072), (4096, 4096)]
SPARSITIES = [0.8] if SMALL else [0.15, 0.3, 0.5, 0.8, 0.9, 0.95]
ROWS = [1, 16] if SMALL else [1, 16, 128, 512]
ROTATION_BYTES = 1 << 12 if SMALL else 96 << 20  # dense bytes of all layers that take turns
ROUNDS = 1 if SMALL else 9
PEERS = ["pykd", "pykd bf16", "torch dense fp32", "torch dense bf16", "torch CSR", "ONNX Runtime dense fp32"]
QUANTIZED = {
    "pykd sparse w8a8": "w8a8",
    "pykd dense w8a8": "w8a8",
    "pykd sparse w4a16": "w4a16",
    "pykd dense w4a16": "w4a16",
}
DENSE = ["torch dense fp32", "ONNX Runtime dense fp32"]
#: (rows, {sparsity: times faster}) that float32 has to reach against the faster of DENSE.
FLOAT32_GOALS = [
    (1, {0.5: 1.5, 0.8: 2.5, 0.9: 3.0}),
    (16, {0.8: 3.0, 0.9: 5.0, 0.95: 7.0}),
    (128, {0.5: 1.5, 0.8: 3.2, 0.9: 4.8, 0.95: 7.3}),
    (512, {0.5: 1.3, 0.8: 2.6, 0.9: 4.2, 0.95: 6.2}),
]
#: (layer, peers of which the fastest counts, rows, sparsity, times faster)
GOALS: list[tuple[str, list[str], int, float, float]] = [
    *(("pykd", DENSE, rows, sparsity, goal) for rows, of in FLOAT32_GOALS for sparsity, goal in of.items()),
    *(("pykd", ["torch CSR"], rows, sparsity, 2.5) for rows in (128, 512) for sparsity in (0.8, 0.9, 0.95)),
    *(("pykd", ["torch dense bf16"], rows, sparsity, 1.0) for rows in (128, 512) for sparsity in (0.8, 0.9, 0.95)),
    ("pykd bf16", ["torch dense bf16"], 1, 0.5, 1.4),
    *(("pykd sparse w8a8", ["pykd dense w8a8"], rows, 0.5, 1 / 1.03) for rows in (128, 512)),
    *(("pykd sparse w8a8", ["pykd dense w8a8"], rows, sparsity, 1.3) for rows in (128, 512) for sparsity in (0.8, 0.9)),
    # Bytes allow 1.26; spreading the codes takes longer than dense at every level, so that the layer is dense for now.
    ("pykd sparse w4a16", ["pykd dense w4a16"], 1, 0.5, 1.15),
]


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
        if peer in QUANTIZED:
            calls = [_quantized(weight, peer) for weight in dense]
            return lambda i: calls[turn(i)](x), dense[0].numel()
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


def _quantized(weight: Tensor, peer: str) -> Callable[[Tensor], Tensor]:
    """The layer of a pruned weight, or the dense kernel over its codes."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = (Linear8bit if QUANTIZED[peer] == "w8a8" else Linear4bit).from_linear(linear)
    if "dense" not in peer:
        return layer
    if isinstance(layer, Linear8bit):
        return functools.partial(linear_8bit, qweight=int8_r16.pack_r16(*layer._tensors()), out_features=layer.rows)
    packed = int4_r16.pack_r16(*layer._tensors(), in_features=layer.columns, group_size=layer.group_size)
    return functools.partial(
        linear_4bit, qweight=packed, code=layer.code, group_size=layer.group_size, out_features=layer.rows
    )


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
    return runtime.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])


def check(case: Case, call: Callable[[int], Any], peer: str) -> None:
    """The first layer's result against float64, within the rounding of the peer's element type."""
    got = torch.as_tensor(call(0)).double()
    want = F.linear(case.x.double(), case.dense[0].double())
    scale = F.linear(case.x.double().abs(), case.dense[0].double().abs()) + 1e-9
    error = float(((got - want).abs() / scale).max())
    allowed = 0.2 if "w4" in peer else 2e-2 if "bf16" in peer or "w8" in peer else 1e-5
    assert error < allowed, f"{peer}: relative error {error:.1e}"


def unfit(peer: str, rows: int) -> str:
    """Why a peer is not measured, or nothing."""
    if peer == "torch dense bf16" and rows > 16 and not torch.cpu._is_avx512_bf16_supported():
        return "torch emulates bf16 on this CPU: seconds a call at many rows"
    return ""


@pytest.mark.parametrize(("rows", "peer"), [(rows, peer) for rows in ROWS for peer in PEERS if not unfit(peer, rows)])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sparse_linear(benchmark: Any, shape: tuple[int, int], sparsity: float, rows: int, peer: str) -> None:
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
def test_goals(shape: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: how many times faster each layer is than the fastest of its peers, and what it should be."""
    lines = ["", f"{shape[0]} x {shape[1]}, {torch.get_num_threads()} threads: times faster (median of rounds), goal"]
    with torch.inference_mode():
        for layer, peers, rows, sparsity, goal in GOALS[:1] if SMALL else GOALS:
            what = f"{layer:18}{rows:4} rows {sparsity:5.0%}  vs {' / '.join(peers):44}"
            if any(unfit(peer, rows) for peer in peers):
                lines.append(f"{what} not measured: {unfit(peers[0], rows)}")
                continue
            ratio, low, high = compare(Case(*shape, sparsity, rows), layer, peers)
            lines.append(
                f"{what}{ratio:6.2f} [{low:.2f}, {high:.2f}] goal {goal:.2f}{'' if ratio >= goal else '  missed'}"
            )
    with capsys.disabled():
        print("\n".join(lines))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto(shape: tuple[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Tuned layers over 20 rounds: the time beside the faster dense one, whose median's lower bound may be 1.03."""
    lines = ["", f"{shape[0]} x {shape[1]}, {torch.get_num_threads()} threads: time of a tuned layer / dense"]
    with torch.inference_mode():
        for sparsity in SPARSITIES:
            for rows in ROWS:
                case = Case(*shape, sparsity, rows)
                report = measure(pack(case.dense[0]), rows=(rows,), again=True)
                ratio, low, high = (1 / value for value in compare(case, "pykd", DENSE))
                chosen = min(report[rows], key=report[rows].__getitem__) if report else "reference"
                verdict = "" if high <= 1.03 else "  missed"
                lines.append(f"{sparsity:6.0%}{rows:5} rows {chosen:8}{ratio:6.2f} [{high:.2f}, {low:.2f}]{verdict}")
    with capsys.disabled():
        print("\n".join(lines))


def compare(case: Case, layer: str, peers: list[str]) -> tuple[float, float, float]:
    """Times faster than the fastest peer: median over the rounds, and its 95 % interval by order statistics."""
    names = [layer, *peers]
    calls = [case.call(name)[0] for name in names]
    for name, call in zip(names, calls, strict=True):
        check(case, call, name)
    rounds = interleave(calls, case.layers)
    best = min(range(1, len(names)), key=lambda i: statistics.median(taken[i] for taken in rounds))
    ratios = sorted(taken[best] / taken[0] for taken in rounds)
    edge = 5 if len(ratios) >= 20 else 0  # of 20: the chance that the median lies outside is 0.041
    return statistics.median(ratios), ratios[edge], ratios[-1 - edge]


def interleave(calls: list[Callable[[int], Any]], layers: int) -> list[list[float]]:
    """Seconds of each call, for every round; each call in turn runs once a round, on the round's layer.

    It runs unmeasured on the layer before first: the threads of the call before it are still awake, and its own asleep.
    """
    for call in calls:
        for i in range(layers):
            call(i)
    rounds = []
    for i in range(2 if SMALL else 20):
        seconds = []
        for call in calls:
            call(i - 1)
            start = time.perf_counter()
            call(i)
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return rounds


def test_file_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Share of the dense float32 bytes that a layer's tensors take in a file, beside what they may take."""
    lines = ["", "bytes in a file / dense float32, 512 x 768"]
    for sparsity, kind, most in (
        (0.15, "fp32", 0.89), (0.5, "fp32", 0.54), (0.9, "fp32", 0.14), (0.97, "fp32", 0.05), (0.5, "2:4", 0.54),
        (0.75, "4x1", 0.26), (0.5, "w4a16", 0.11), (0.5, "w8a8", 0.17),
    ):  # fmt: skip
        linear = nn.Linear(768, 512, bias=False)
        mask = torch.rand(512, 768) >= sparsity
        if kind == "2:4":
            mask = (torch.rand(512, 192, 4).argsort(-1) < 2).view(512, 768)
        elif kind == "4x1":
            mask = (torch.rand(128, 768) >= sparsity).repeat_interleave(4, 0)
        linear.weight = nn.Parameter(linear.weight * mask)
        quantized = {"w4a16": Linear4bit, "w8a8": Linear8bit}.get(kind)
        layer = SparseLinear.from_linear(linear, mask=mask) if quantized is None else quantized.from_linear(linear)
        share = sum(tensor.nbytes for tensor in layer.state_dict().values()) / linear.weight.nbytes
        lines.append(f"{sparsity:6.0%} {kind:6}{share:7.3f} at most {most}")
        assert share <= most, lines[-1]
    with capsys.disabled():
        print("\n".join(lines))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("sparsity", "goal"), [(0.5, 1.3), (0.9, 3.0)])
def test_gpu_goals(sparsity: float, goal: float, capsys: pytest.CaptureFixture[str]) -> None:
    """One row, bfloat16, 8192 x 8192: times faster than the dense multiplication (cuBLAS)."""
    side = 256 if SMALL else 8192
    x = torch.randn(1, side, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(side, side, device="cuda") >= sparsity
    dense = [torch.randn(side, side, device="cuda", dtype=torch.bfloat16) * mask for _ in range(4)]
    packed = [pack(weight) for weight in dense]
    calls: list[Callable[[int], Any]] = [
        lambda i: sparse_linear(x, packed[i % 4]),
        lambda i: F.linear(x, dense[i % 4]),
    ]
    with torch.inference_mode():
        rounds = interleave([lambda i, call=call: (call(i), torch.cuda.synchronize()) for call in calls], 4)
    ratio = statistics.median(taken[1] / taken[0] for taken in rounds)
    with capsys.disabled():
        print(f"\n{side} x {side}, bf16, 1 row, {sparsity:.0%}: {ratio:.2f} times faster than cuBLAS, goal {goal}")
