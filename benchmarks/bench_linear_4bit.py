"""4-bit linear layers beside the dense and quantized ones a user would pick instead, with weights rotated out of cache.

Each case is checked first against float64 with the dequantized weights. `extra_info` of every result holds the largest
error over the sum of magnitudes, the bytes of one weight, the bandwidth they imply and that of a read probe run in the
same minute. A second test prints ratios of interleaved rounds, which load on the machine moves far less than times,
with the share of the probe's bandwidth and the errors beside them. Groups have 32 weights where a name says nothing
else. bitsandbytes is measured where it is installed. PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.io.export.onnx_model import session_options
from pykd.nn import Linear4bit
from pykd.nn.codecs.eight_bit import quantize_8bit
from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.ops.int4_r16 import dequantize, pack_r16, unpack_nibbles
from pykd.ops.linear_4bit import linear_4bit

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(96, 64)] if SMALL else [(3072, 768), (768, 3072), (4096, 4096)]
ROWS = [1, 8] if SMALL else [1, 8, 32, 256]
GROUP = 32
ROTATION_BYTES = 1 << 12 if SMALL else 96 << 20  # int4 bytes of all layers that take turns
ROUNDS = 1 if SMALL else 9
PEERS = [
    "pykd int4",
    "pykd uint4",
    "pykd nf4",
    "pykd int4, bf16 x",
    "pykd w4a8",
    "pykd w4a8, uint4",
    "pykd w4a8, bf16 x",
    "pykd w4a8, g=128",
    "torch dense fp32",
    "torch dense bf16",
    "torch dynamic int8",
    "torch int4, fp32 x",
    "torch int4, bf16 x",
    "ONNX Runtime int4",
]
if importlib.util.find_spec("bitsandbytes") is not None:  # a peer that pykd does not install: pip install bitsandbytes
    PEERS += ["bitsandbytes nf4", "bitsandbytes nf4, bf16 x"]
#: Those whose times are divided by those of all others.
OURS = ["pykd int4", "pykd int4, bf16 x", "pykd w4a8", "pykd w4a8, g=128"]


class Case:
    """Layers of one shape, as every peer wants them, made when asked for; a few distinct weights, copied to rotate."""

    def __init__(self, out: int, columns: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.x = rows, torch.randn(rows, columns, generator=generator)
        self.weight = torch.randn(out, columns, generator=generator)
        self.copies = max(2, ROTATION_BYTES // (out * columns // 2))

    def rotate(self, call: Callable[[Any], Any], make: Callable[[], Any], size_bytes: int) -> tuple[Any, int]:
        copies = max(2, self.copies * self.weight.numel() // 2 // size_bytes)
        layers = [make() for _ in range(copies)]
        return lambda i: call(layers[i % copies]), size_bytes

    def call(self, peer: str) -> tuple[Callable[[int], Any], int, Tensor]:
        """The peer as a function of the turn, the bytes of one of its weights, and the weight that it stands for."""
        x, (out, columns) = self.x.bfloat16() if "bf16" in peer else self.x, self.weight.shape
        if peer.startswith("pykd"):
            code = "uint4" if "uint4" in peer else "nf4" if "nf4" in peer else "int4"
            group = 128 if "g=128" in peer else GROUP
            tensors = quantize_4bit(self.weight, code=code, group_size=group)
            packed = pack_r16(*tensors, in_features=columns, group_size=group)
            options: dict[str, Any] = {"code": code, "out_features": out, "group_size": group}
            options["inputs"] = "int8" if "w4a8" in peer else "keep"
            call = lambda layer: linear_4bit(x, layer, **options)  # noqa: E731
            return *self.rotate(call, packed.clone, packed.nbytes), _dense(tensors, code, columns, group)
        if peer.startswith("torch dense"):
            dense = self.weight.to(x.dtype)
            return *self.rotate(lambda layer: F.linear(x, layer), dense.clone, dense.nbytes), dense
        if peer == "torch dynamic int8":
            return self._dynamic_int8(x)
        if peer.startswith("bitsandbytes"):
            return self._bitsandbytes(x)
        tensors = quantize_4bit(self.weight, code="int4", group_size=GROUP)
        dense, size = _dense(tensors, "int4", columns), tensors.qweight.nbytes + tensors.scales.nbytes
        if peer.startswith("torch int4"):
            make, call = _torch_int4(tensors, x)
        else:
            make, call = _onnx_int4(tensors, x)
        return *self.rotate(call, make, size), dense

    def _dynamic_int8(self, x: Tensor) -> tuple[Callable[[int], Any], int, Tensor]:
        codes, scales = quantize_8bit(self.weight)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch announces that quantized tensors will go
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        make = lambda: torch.ops.quantized.linear_prepack(weight, None)  # noqa: E731
        call = lambda layer: torch.ops.quantized.linear_dynamic(x, layer, reduce_range=True)  # noqa: E731
        return *self.rotate(call, make, codes.nbytes), codes.double() * scales.double().unsqueeze(1)

    def _bitsandbytes(self, x: Tensor) -> tuple[Callable[[int], Any], int, Tensor]:
        """Its layer, as it prepares itself for the CPU at the first call."""
        package = importlib.import_module("bitsandbytes")
        layer = package.nn.Linear4bit(x.shape[1], len(self.weight), bias=False, compute_dtype=x.dtype)
        options = {"requires_grad": False, "blocksize": GROUP, "quant_type": "nf4"}
        layer.weight = package.nn.Params4bit(self.weight.to(x.dtype), **options)
        layer = layer.to("cpu").eval()  # quantizes
        state = layer.weight.quant_state
        dense = package.functional.dequantize_4bit(layer.weight.data, state)
        size = layer.weight.nbytes + state.absmax.nbytes
        return *self.rotate(lambda layer: layer(x), lambda: copy.deepcopy(layer), size), dense


def _dense(tensors: FourBit, code: str, columns: int, group: int = GROUP) -> Tensor:
    return dequantize(*tensors, code=code, in_features=columns, group_size=group)


def _torch_int4(tensors: FourBit, x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    codes = unpack_nibbles(tensors.qweight, x.shape[1]).to(torch.int32)
    scales = tensors.scales.t().to(x.dtype)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=2).contiguous()

    def make() -> Any:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales_and_zeros.clone()

    def call(layer: Any) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, layer[0], GROUP, layer[1])

    return make, call


def _onnx_int4(tensors: FourBit, x: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    out, groups = tensors.scales.shape
    blocks = tensors.qweight.view(out, groups, GROUP // 2)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        **{"K": x.shape[1], "N": out, "bits": 4, "block_size": GROUP, "accuracy_level": 4},
    )
    value, array = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, [None, x.shape[1]])],
        [value("y", onnx.TensorProto.FLOAT, [None, out])],
        [array(blocks.numpy(), "codes"), array(tensors.scales.float().flatten().numpy(), "scales")],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    feed = {"x": x.numpy()}

    def make() -> Any:
        return runtime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])

    return make, lambda session: session.run(None, feed)[0]


def unfit(peer: str, rows: int) -> str:
    """Why a peer is not worth waiting for on this CPU, or nothing."""
    emulated = not torch.cpu._is_avx512_bf16_supported()
    if peer in ("torch dense bf16", "bitsandbytes nf4, bf16 x") and rows > 8 and emulated:
        return "torch emulates bf16 on this CPU: seconds a call at many rows"
    if peer == "torch int4, fp32 x" and rows > 8:
        return "torch runs a scalar loop for float32 activations: seconds a call at many rows"
    return ""


def check(case: Case, call: Callable[[int], Any], peer: str, weight: Tensor) -> float:
    """Largest error of the first layer over the sum of magnitudes; within the rounding of the peer's element type."""
    got = torch.as_tensor(call(0)).double()
    want = F.linear(case.x.double(), weight.double())
    error = float(((got - want).abs() / F.linear(case.x.double().abs(), weight.double().abs())).max())
    rounds = any(name in peer for name in ("bf16", "int8", "ONNX", "w4a8"))
    assert error < (2e-2 if rounds else 1e-6), f"{peer}: relative error {error:.1e}"
    return error


def read_bandwidth_gb_s() -> float:
    """Best of three sums over memory that no cache holds."""
    memory = torch.ones((1 << 20) if SMALL else (64 << 20))
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        memory.sum()
        best = max(best, memory.nbytes / (time.perf_counter() - start) / 1e9)
    return best


@pytest.mark.parametrize(("rows", "peer"), [(rows, peer) for rows in ROWS for peer in PEERS if not unfit(peer, rows)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_4bit(benchmark: Any, shape: tuple[int, int], rows: int, peer: str) -> None:
    case = Case(*shape, rows)
    with torch.inference_mode():
        call, size_bytes, weight = case.call(peer)
        error = check(case, call, peer, weight)
        turn = iter(range(1 << 62))
        benchmark.pedantic(lambda: call(next(turn)), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        relative_error=error,
        weight_bytes=size_bytes,
        bandwidth_gb_s=size_bytes / benchmark.stats.stats.median / 1e9,
        probe_gb_s=read_bandwidth_gb_s(),
        threads=torch.get_num_threads(),
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int], rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: OURS over each peer (medians of the rounds' ratios), shares of the bandwidth, all errors."""
    case = Case(*shape, rows)
    calls, errors, sizes = {}, {}, {}
    times: dict[str, list[float]] = {peer: [] for peer in PEERS if not unfit(peer, rows)}
    with torch.inference_mode():
        for peer in times:
            calls[peer], sizes[peer], weight = case.call(peer)
            errors[peer] = check(case, calls[peer], peer, weight)
        for turn in range(ROUNDS + 1):
            for peer, call in calls.items():
                call(turn - 1)  # unmeasured: the threads of the peer before are still awake, and its own asleep
                start = time.perf_counter()
                call(turn)
                times[peer].append(time.perf_counter() - start)
    probe_gb_s = read_bandwidth_gb_s()
    lines = [", ".join(f"{error:.0e} {peer}" for peer, error in errors.items())]
    for ours in OURS:
        ratios = {
            peer: statistics.median(a / b for a, b in zip(times[ours][1:], taken[1:], strict=True))
            for peer, taken in times.items()
            if peer != ours
        }
        assert all(ratio > 0 for ratio in ratios.values())
        median_us = statistics.median(times[ours][1:]) * 1e6
        share = sizes[ours] / median_us / 1e3 / probe_gb_s
        text = ", ".join(f"{ratio:.2f} of {peer}" for peer, ratio in ratios.items())
        lines.insert(-1, f"{ours} {median_us:.0f} us, {share:.2f} of the read bandwidth = {text}")
    with capsys.disabled():
        print(f"\n{shape[0]} x {shape[1]}, rows {rows}: " + "\n  ".join([*lines[:-1], f"errors: {lines[-1]}"]))


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "nf4"])
def test_cost_of_a_call(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A 1 x 64 x 64 call is all overhead: the layer's time over that of torch.nn.functional.linear."""
    linear, x = torch.nn.Linear(64, 64), torch.randn(1, 64)
    layer = Linear4bit.from_linear(linear, scheme=scheme)
    calls = {"torch": lambda: F.linear(x, linear.weight, linear.bias), scheme: lambda: layer(x)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(10 * ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(100):
                    call()
                times[name].append((time.perf_counter() - start) / 100)
    ratio = statistics.median(a / b for a, b in zip(times[scheme], times["torch"], strict=True))
    with capsys.disabled():
        print(f"\n1 x 64 x 64: Linear4bit {scheme} {min(times[scheme]) * 1e6:.1f} us = {ratio:.2f} of F.linear")
    assert ratio > 0
