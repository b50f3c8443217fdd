"""4-bit linear layers on an NVIDIA GPU beside bf16 by cuBLAS, bitsandbytes and gemlite, weights rotated out of cache.

Each case is checked first against float64 with the weights that the layer stands for. What is timed is a CUDA graph of
one call for every copy of the weight, so that the host's time between kernels does not count; `extra_info` holds the
time of one call there and by itself (`call_us`), the largest error over the sum of magnitudes, the bytes of one weight
and the bandwidth they imply, also as a share of that of a copy measured beside it. Two routes for many rows are timed
by themselves too ("triton": tiles that decode as they multiply; "dense": the weight written out for cuBLAS), so
that the rows from which the second wins can be read off; `route` says which one "pykd" takes. PYKD_BENCH=small runs the
smallest shape once. bitsandbytes and gemlite are measured where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import captured, copy_bytes_per_s, gpu_seconds
from torch import Tensor

from pykd.nn.codecs.four_bit import quantize_4bit
from pykd.ops import linear_4bit_gpu
from pykd.ops.dispatch import cuda_library, triton_available
from pykd.ops.int4_r16 import dequantize, unpack_nibbles
from pykd.ops.linear_4bit import linear_4bit

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(128, 128)] if SMALL else [(8192, 8192)]
ROWS = [1, 9] if SMALL else [1, 8, 16, 256]
GROUP = 64
ROTATION_BYTES = 1 << 16 if SMALL else 256 << 20  # of all weights that take turns, several times an H100's L2
ROUNDS = 2 if SMALL else 15
PEERS = ["pykd int4", "pykd uint4", "pykd nf4", "torch bf16"]
PEERS += [f"{name} {code}" for name, code in (("bitsandbytes", "nf4"), ("gemlite", "int4"))
          if importlib.util.find_spec(name) is not None]  # fmt: skip

#: Rows around the limits of `linear_4bit_gpu.choose`, and the two routes on either side of them.
CROSSING = {"int4": [33], "nf4": [33]} if SMALL else {"int4": [64, 128, 192, 256], "nf4": [16, 32, 64]}
CASES = [(rows, peer) for rows in ROWS for peer in PEERS]
if triton_available():
    CASES += [(n, f"{route} {code}") for code, rows in CROSSING.items() for n in rows for route in ("triton", "dense")]

#: (make one copy of the layer, call it on x, bytes of its weight, the float weight that it stands for)
Layer = tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], int, Tensor]


def layer_of(peer: str, weight: Tensor) -> Layer:
    """The peer's layer of a bfloat16 weight."""
    name, code = peer.split()
    if name == "torch":
        return weight.clone, lambda layer, x: F.linear(x, layer), weight.nbytes, weight
    if name == "bitsandbytes":
        return _bitsandbytes(weight)
    tensors = quantize_4bit(weight.float(), code=code, group_size=GROUP)
    dense = dequantize(*tensors, code=code, in_features=weight.shape[1], group_size=GROUP)
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if name == "gemlite":
        return _gemlite(unpack_nibbles(tensors.qweight, weight.shape[1]), tensors.scales), _call, size, dense

    def call(layer: linear_4bit_gpu.Weight, x: Tensor) -> Tensor:
        if name == "pykd":
            return linear_4bit(x, layer.qweight, layer.scales, zeros=layer.zeros, code=code, group_size=GROUP)
        if name == "dense":
            return linear_4bit_gpu.dense(x, layer, None)
        result: Tensor = importlib.import_module("pykd.kernels.linear_4bit").linear_4bit(x, layer, None)
        return result

    def make() -> linear_4bit_gpu.Weight:
        copies: Any = [None if tensor is None else tensor.clone() for tensor in tensors]
        return linear_4bit_gpu.Weight.of(*copies, code, GROUP)

    return make, call, size, dense


def _call(layer: Any, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


def _bitsandbytes(weight: Tensor) -> Layer:
    package = importlib.import_module("bitsandbytes")
    codes, state = package.functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    dense = package.functional.dequantize_4bit(codes, state)

    def call(layer: Tensor, x: Tensor) -> Tensor:
        result: Tensor = package.matmul_4bit(x, layer.t(), quant_state=state)
        return result

    return codes.clone, call, codes.nbytes + state.absmax.nbytes, dense


def _gemlite(codes: Tensor, scales: Tensor) -> Callable[[], Any]:
    """Its Triton layer of int4 codes [out, in], whose zero is 8; scales [out, groups]."""
    core = importlib.import_module("gemlite.core")
    kind, (out, columns) = core.TORCH_TO_DTYPE[torch.bfloat16], codes.shape
    scales = scales.bfloat16().reshape(-1, 1)

    def make() -> Any:
        sizes = {"group_size": GROUP, "in_features": columns, "out_features": out}
        layer = core.GemLiteLinearTriton(4, **sizes, input_dtype=kind, output_dtype=kind)
        layer.pack(codes.clone(), scales, torch.full_like(scales, 8), None)
        return layer

    return make


def route_of(peer: str, rows: int) -> str:
    """The implementation that a peer's call takes."""
    name, code = peer.split()
    if name != "pykd":
        return name
    there = {"library": cuda_library() is not None, "triton": triton_available()}
    return linear_4bit_gpu.choose(rows, torch.bfloat16, code, GROUP, **there)


def check(x: Tensor, got: Tensor, weight: Tensor) -> float:
    """Largest error over the sum of magnitudes; within the rounding of bfloat16."""
    exact = F.linear(x.double(), weight.double())
    error = float(((got.double() - exact).abs() / F.linear(x.double().abs(), weight.double().abs())).max())
    assert error < 2e-2, f"relative error {error:.1e}"
    return error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("rows", "peer"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_4bit_gpu(benchmark: Any, shape: tuple[int, int], rows: int, peer: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight, x = (
        torch.randn(*size, generator=generator, device="cuda").bfloat16() for size in (shape, (rows, shape[1]))
    )
    with torch.inference_mode():
        make, call, size_bytes, dense = layer_of(peer, weight)
        layers = [make() for _ in range(max(2, ROTATION_BYTES // size_bytes))]
        error = check(x, call(layers[0], x), dense)
        replay = captured(lambda turn: call(layers[turn], x), len(layers))

        def once() -> None:
            replay()
            torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=1)
        alone_s = statistics.median(gpu_seconds(lambda: call(layers[0], x)) for _ in range(ROUNDS + 2))
    each_s = statistics.median(gpu_seconds(replay) for _ in range(ROUNDS)) / len(layers)
    limit = copy_bytes_per_s(torch.empty(ROTATION_BYTES, dtype=torch.uint8, device="cuda"), ROUNDS)
    benchmark.extra_info.update(
        route=route_of(peer, rows),
        graph_us=each_s * 1e6,
        call_us=alone_s * 1e6,
        relative_error=error,
        weight_bytes=size_bytes,
        bandwidth_gb_s=size_bytes / each_s / 1e9,
        share_of_copy=size_bytes / each_s / limit,
    )
