"""8-bit linear layers beside the dense and quantized ones a user would pick instead, with weights rotated out of cache.

Each case is checked first against float64 with the dequantized weights. `extra_info` of every result holds the largest
error over the sum of magnitudes, the bandwidth that the bytes of one weight imply, the products a second, and what
probes of the same minute reach: a read of memory, and a float32 matrix product. A second test prints ratios of
interleaved rounds, which load on the machine moves far less than times. PYKD_BENCH=small runs the smallest shape once.
"""

from __future__ import annotations

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

from pykd.nn.codecs.eight_bit import quantize_8bit
from pykd.ops.int8_r16 import pack_r16
from pykd.ops.linear_8bit import linear_8bit, quantize_rows

SMALL = os.environ.get("PYKD_BENCH") == "small"
SHAPES = [(96, 64)] if SMALL else [(3072, 768), (768, 3072), (4096, 4096)]
ROWS = [1, 8] if SMALL else [1, 8, 32, 256]
ROTATION_BYTES = 1 << 12 if SMALL else 128 << 20  # of all layers that take turns
ROUNDS = 1 if SMALL else 9
#: torch's dynamic int8 rounds activations to 7 bits on CPUs without VNNI (reduce_range), pykd to 8 on all.
PEERS = ["pykd w8a8", "pykd w8a16", "pykd w8a8, bf16 x", "torch dense fp32", "torch dynamic int8", "torch._int_mm"]


class Case:
    """Layers of one shape, as every peer wants them; one weight, copied to rotate."""

    def __init__(self, out: int, columns: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, columns, generator=generator)
        self.dense = torch.randn(out, columns, generator=generator)
        self.codes, self.scales = quantize_8bit(self.dense)

    def rotate(self, call: Callable[[Any], Any], make: Callable[[], Any], size_bytes: int) -> tuple[Any, int]:
        copies = max(2, ROTATION_BYTES // size_bytes)
        layers = [make() for _ in range(copies)]
        return lambda i: call(layers[i % copies]), size_bytes

    def call(self, peer: str) -> tuple[Callable[[int], Any], int]:
        """The peer as a function of the turn, and the bytes of one of its weights."""
        x, out = self.x.bfloat16() if "bf16" in peer else self.x, len(self.scales)
        if peer.startswith("pykd"):
            packed, scheme = pack_r16(self.codes, self.scales), peer.split()[1].strip(",")
            call = lambda layer: linear_8bit(x, layer, scheme=scheme, out_features=out)  # noqa: E731
            return self.rotate(call, packed.clone, packed.nbytes)
        if peer == "torch dense fp32":
            dense = self.codes * self.scales.unsqueeze(1)
            return self.rotate(lambda layer: F.linear(x, layer), dense.clone, dense.nbytes)
        if peer == "torch._int_mm":
            return self.rotate(self._int_mm, self.codes.clone, self.codes.nbytes)
        return self._dynamic_int8()

    def _int_mm(self, codes: Tensor) -> Tensor:
        rounded, row_scales = quantize_rows(self.x)
        return torch._int_mm(rounded, codes.t()) * row_scales * self.scales

    def _dynamic_int8(self) -> tuple[Callable[[int], Any], int]:
        zeros = torch.zeros(len(self.scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch announces that quantized tensors will go
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(self.codes, self.scales.double(), zeros, 0)
        reduce_range = not torch.cpu._is_vnni_supported()
        make = lambda: torch.ops.quantized.linear_prepack(weight, None)  # noqa: E731
        call = lambda layer: torch.ops.quantized.linear_dynamic(self.x, layer, reduce_range=reduce_range)  # noqa: E731
        return self.rotate(call, make, self.codes.nbytes)


def unfit(peer: str, rows: int) -> str:
    """Why a peer is not worth waiting for on this CPU, or nothing."""
    if peer == "torch._int_mm" and rows > 8 and not torch.cpu._is_vnni_supported():
        return "torch._int_mm is a plain loop on CPUs without VNNI: seconds a call at many rows"
    return ""


def check(case: Case, call: Callable[[int], Any], peer: str) -> float:
    """Largest error of the first layer over the sum of magnitudes; within the rounding of the peer's element type."""
    got = call(0).double()
    weight = case.codes.double() * case.scales.double().unsqueeze(1)
    want = F.linear(case.x.double(), weight)
    error = float(((got - want).abs() / F.linear(case.x.double().abs(), weight.abs())).max())
    exact = peer in ("pykd w8a16", "torch dense fp32")
    assert error < (1e-6 if exact else 2e-2), f"{peer}: relative error {error:.1e}"
    return error


def best_s(call: Callable[[], Any]) -> float:
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def probes() -> dict[str, float]:
    """What the machine reaches this minute: a sum over memory that no cache holds, a float32 matrix product."""
    memory = torch.ones((1 << 20) if SMALL else (64 << 20))
    side = 128 if SMALL else 1024
    square = torch.ones(side, side)
    return {
        "probe_gb_s": memory.nbytes / best_s(memory.sum) / 1e9,
        "probe_g_products_s": side**3 / best_s(lambda: square @ square) / 1e9,
    }


@pytest.mark.parametrize(("rows", "peer"), [(rows, peer) for rows in ROWS for peer in PEERS if not unfit(peer, rows)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_8bit(benchmark: Any, shape: tuple[int, int], rows: int, peer: str) -> None:
    case = Case(*shape, rows)
    with torch.inference_mode():
        call, size_bytes = case.call(peer)
        error = check(case, call, peer)
        turn = iter(range(1 << 62))
        benchmark.pedantic(lambda: call(next(turn)), rounds=ROUNDS, warmup_rounds=1)
    median_s = benchmark.stats.stats.median
    benchmark.extra_info.update(
        relative_error=error,
        bandwidth_gb_s=size_bytes / median_s / 1e9,
        g_products_s=rows * shape[0] * shape[1] / median_s / 1e9,
        threads=torch.get_num_threads(),
        **probes(),
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratios(shape: tuple[int, int], rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Interleaved rounds: the time of pykd w8a8 over that of each peer (median of the rounds' ratios)."""
    case = Case(*shape, rows)
    peers = [peer for peer in PEERS if not unfit(peer, rows)]
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    with torch.inference_mode():
        calls = {peer: case.call(peer) for peer in peers}
        errors = {peer: check(case, call, peer) for peer, (call, _) in calls.items()}
        for turn in range(ROUNDS + 1):
            for peer, (call, _) in calls.items():
                start = time.perf_counter()
                call(turn)
                times[peer].append(time.perf_counter() - start)
    first, probe = PEERS[0], probes()
    median_s = statistics.median(times[first][1:])
    ratios = {
        peer: statistics.median(a / b for a, b in zip(times[first][1:], taken[1:], strict=True))
        for peer, taken in times.items()
    }
    bandwidth = calls[first][1] / median_s / 1e9 / probe["probe_gb_s"]
    rate = rows * shape[0] * shape[1] / median_s / 1e9 / probe["probe_g_products_s"]
    with capsys.disabled():
        print(
            f"\n{shape[0]} x {shape[1]}, rows {rows}: {first} {median_s * 1e6:.0f} us, {bandwidth:.2f} of the read "
            f"bandwidth, {rate:.2f} of the float32 product rate, error {errors[first]:.0e}"
        )
        for peer, ratio in ratios.items():
            print(f"  {ratio:.2f} of the time of {peer}, error {errors[peer]:.0e}")
    assert all(ratio > 0 for ratio in ratios.values())
