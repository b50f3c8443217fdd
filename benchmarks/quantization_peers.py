"""What others make of a linear layer, for `bench_quantization_methods.py`: plain rounding, the textbook, packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from quality import stored_bytes
from torch import Tensor, nn

from pykd.data import DataBundle
from pykd.nn.codecs.four_bit import FourBit, from_levels
from pykd.nn.selection import select_layers
from pykd.quantization import Inputs

#: weight, group size -> (what the peer makes of it, the bytes that it stores)
Peer = Callable[[Tensor, int], tuple[Tensor, int]]


def group_range(group: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """Scale, float16 in float64, and zero point that just hold each row of a group [rows, size]."""
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    scale = ((high - low) / 15 if code == "uint4" else group.abs().amax(1) / 7.5).half().double().clamp(min=2**-24)
    return scale, (-low / scale).round().clamp(0, 15) if code == "uint4" else torch.full_like(low, 8.0)


@torch.no_grad()
def plain(weight: Tensor, inputs: Inputs | None, *, code: str, group_size: int) -> FourBit:
    """Round to nearest between the smallest and the largest weight of a group."""
    return _by_columns(weight, lambda work, column, error: None, code, group_size)


@torch.no_grad()
def textbook_gptq(weight: Tensor, inputs: Inputs, *, code: str, group_size: int) -> FourBit:
    """Frantar et al. 2022 as printed: columns in order, 1 % damping, a group's range when its turn comes."""
    hessian = inputs.hessian[0].double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    root = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)

    def feed_back(work: Tensor, column: int, error: Tensor) -> None:
        work[:, column + 1 :] -= (error / root[column, column])[:, None] * root[column, None, column + 1 :]

    return _by_columns(weight, feed_back, code, group_size)


def _by_columns(weight: Tensor, after: Callable[[Tensor, int, Tensor], None], code: str, group_size: int) -> FourBit:
    """Round column after column; after(weight, column, error) may change what comes behind it."""
    work = weight.detach().double().clone()
    levels, scales, zeros = torch.empty_like(work), [], []
    for column in range(work.shape[1]):
        if column % group_size == 0:
            scale, zero = group_range(work[:, column : column + group_size], code)
            scales.append(scale)
            zeros.append(zero)
        levels[:, column] = (work[:, column] / scale).round().clamp(-zero, 15 - zero)
        after(work, column, work[:, column] - levels[:, column] * scale)
    found = torch.stack(zeros, 1).float() if code == "uint4" else None
    return from_levels(levels.float(), torch.stack(scales, 1).float(), found, code=code, group_size=group_size)


def bitsandbytes(kind: str) -> Peer:
    """Round to the table under the largest magnitude; scales in float32."""
    from bitsandbytes import functional

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=group_size, quant_type=kind)
        return functional.dequantize_4bit(packed, state), packed.nbytes + state.absmax.nbytes

    return round_weight


def hqq(longer: int = 1) -> Peer:
    """Half-quadratic quantization with zero points in floating point; float16 scales and zero points."""
    from hqq.core.quantize import Quantizer

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        options: dict[str, Any] = {"nbits": 4, "channel_wise": True, "optimize": True, "axis": 1, "device": "cpu"}
        packed, meta = Quantizer.quantize(
            weight, group_size=longer * group_size, compute_dtype=torch.float16, **options
        )
        size_bytes = packed.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        return Quantizer.dequantize(packed, meta).to(weight.dtype), size_bytes

    return round_weight


def torchao() -> Peer:
    """Symmetric int4 under the largest magnitude; scales in the weight's type."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        holder[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(holder, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size)))
        stored: Any = holder[0].weight
        return stored.dequantize(), -(-weight.numel() // 2) + stored.scale.nbytes

    return round_weight


PEERS: dict[str, Callable[[], Peer]] = {
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes("fp4"),
    "HQQ int4": hqq,
    "HQQ int4, groups twice as long": lambda: hqq(2),
    "torchao int4": torchao,
}


@torch.no_grad()
def apply_peer(model: nn.Module, peer: Peer, group_size: int) -> int:
    """Round the linear layers that `quantize` would; the bytes of all tensors with theirs as the peer stores them."""
    total = stored_bytes(model)
    for layer in select_layers(model, (nn.Linear,)).chosen.values():
        weight: Any = layer.weight
        rounded, size_bytes = peer(weight.detach(), group_size)
        total += size_bytes - weight.nbytes
        weight.copy_(rounded)
    return total


def _bytes_in_int8(model: nn.Module, names: dict[str, nn.Module], scales_per_output: bool) -> int:
    total = stored_bytes(model)
    for layer in names.values():
        weight: Any = layer.weight
        total += weight.numel() - weight.nbytes + 4 * (len(weight) if scales_per_output else 1)
    return total


def exact_products(codes: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The products of int8 matrices [rows, k] and [k, columns], times a scale per row: no sum is rounded.

    float32 holds whole numbers up to 2^24, which k products of 127 * 127 stay below up to k = 1040.
    """
    wide = torch.float32 if codes.shape[1] <= 1040 else torch.float64
    return (codes.to(wide) @ weight.to(wide)).to(scales.dtype) * scales


def torchao_int8(model: nn.Module, data: DataBundle) -> int:
    """torchao's int8 with activations rounded per token, in the linear layers that `quantize` would take.

    Where the CPU has no instructions for it, torch multiplies int8 in a plain loop, a hundred times slower; the same
    whole numbers come from `exact_products` there.
    """
    from torchao.kernel import intmm
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if not torch.cpu._is_vnni_supported():
        intmm._int_scaled_matmul_cpu = exact_products
    chosen = select_layers(model, (nn.Linear,)).chosen
    total = _bytes_in_int8(model, chosen, scales_per_output=True)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    return total


def torch_dynamic(model: nn.Module, data: DataBundle) -> int:
    """torch's dynamic int8, one scale a weight and one a batch of activations, in the same linear layers."""
    chosen = select_layers(model, (nn.Linear,)).chosen
    total = _bytes_in_int8(model, chosen, scales_per_output=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed
        torch.ao.quantization.quantize_dynamic(model, set(chosen), dtype=torch.qint8, inplace=True)
    return total


#: Of INT8, those whose products are not multiplied by their own kernels on this machine (`torchao_int8`).
OWN_PRODUCTS = set() if torch.cpu._is_vnni_supported() else {"torchao int8 per token"}
#: Peers that round activations too, and so run as they are.
INT8: dict[str, Callable[[nn.Module, DataBundle], int]] = {
    "torchao int8 per token": torchao_int8,
    "torch dynamic int8": torch_dynamic,
}
