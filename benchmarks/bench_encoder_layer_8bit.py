"""Encoders of short texts on a CPU: what lies between their linear layers, op by op and in a whole model.

Each case is checked first: ops against float64, `fuse` against the model as it was. Ratios are medians of alternating
rounds. PYKD_BENCH=small runs the smallest shapes once.

    pytest -s -c benchmarks/pytest.ini benchmarks/bench_encoder_layer_8bit.py
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pykd
from pykd.models.huggingface import load_huggingface
from pykd.models.sizes import preset_config
from pykd.ops.add_norm import add_norm
from pykd.ops.attention import attention

SMALL = os.environ.get("PYKD_BENCH") == "small"
ROUNDS = 1 if SMALL else 40
LENGTHS = [7] if SMALL else [32, 64, 128]
HEADS, DIM = (2, 8) if SMALL else (12, 64)
PRESET = "2x64" if SMALL else "6x768"

Calls = dict[str, Callable[[], Any]]


def medians_ms(calls: Calls) -> dict[str, float]:
    """Milliseconds of each call, in rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[2:] or taken) for name, taken in times.items()}


def show(capsys: pytest.CaptureFixture[str], title: str, found: dict[str, float]) -> None:
    first = next(iter(found))
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} threads, {pykd.build_info()['isa']}")
        for name, taken in found.items():
            print(f"  {name:34s} {taken:8.3f} ms, {taken / found[first]:5.2f} of {first}")


@pytest.mark.parametrize("length", LENGTHS)
def test_ops(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One text's attention, and the normalisation of a sum, beside torch's."""
    width = HEADS * DIM
    q, k, v = torch.randn(3, 1, length, width)
    heads = [x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in (q, k, v)]
    x, residual, weight, bias = torch.randn(length, width), torch.randn(length, width), *torch.randn(2, width)
    with torch.inference_mode():
        exact = F.scaled_dot_product_attention(*(part.double() for part in heads)).transpose(1, 2).flatten(2)
        assert (attention(q, k, v, heads=HEADS) - exact).abs().max() < 1e-5
        assert (
            add_norm(x, residual, weight, bias) - F.layer_norm(x + residual, (width,), weight, bias)
        ).abs().max() < 1e-4
        looks: Calls = {
            "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(*heads),
            "attention": lambda: attention(q, k, v, heads=HEADS),
        }
        sums: Calls = {
            "layer_norm(x + residual)": lambda: F.layer_norm(x + residual, (width,), weight, bias),
            "add_norm": lambda: add_norm(x, residual, weight, bias),
        }
        for calls in (looks, sums):
            show(capsys, f"{length} tokens, {HEADS} heads of {DIM}", medians_ms(calls))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("cut", [0.0, 0.75], ids=["whole", "heads and neurons -75 %"])
def test_models(cut: float, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A BERT with random weights, whose time does not depend on them: fp32, w8a8, and both fused."""
    torch.manual_seed(0)
    config = preset_config(PRESET, "bert", vocab_size=1000)
    dense = load_huggingface(None, "sequence-classification", num_labels=58, config=config).eval()
    if cut:
        pykd.prune(pykd.prune(dense, "heads", cut), "neurons", cut)
    packed = pykd.quantize(copy.deepcopy(dense), "w8a8").eval()
    models = {"fp32": dense, "fp32, fused": pykd.fuse(copy.deepcopy(dense))}
    models |= {"w8a8": packed, "w8a8, fused": pykd.fuse(copy.deepcopy(packed))}
    ids = torch.randint(0, 1000, (1, length))
    with torch.inference_mode():
        for name, allowed in (
            ("fp32", 1e-4),
            ("w8a8", 0.1),
        ):  # of logits around 1; codes at an edge take the other side
            assert (models[name](ids).logits - models[f"{name}, fused"](ids).logits).abs().max() < allowed
        found = medians_ms({name: (lambda model=model: model(ids)) for name, model in models.items()})
    show(capsys, f"{PRESET}, {cut:.0%} of heads and neurons cut, {length} tokens", found)
