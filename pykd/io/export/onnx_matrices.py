"""The packed matrices of compressed layers inside a graph for ONNX Runtime.

- int4 and uint4 become `com.microsoft::MatMulNBits`; its accuracy level 1 keeps activations in float32, level 4 rounds
  them to int8 under a scale per row and block, which is what w4a8 does.
- w8a8 becomes MatMulInteger between codes shifted to uint8, with row scales and output scales multiplied one after the
  other: ONNX Runtime's CPU kernels for int8 times int8 saturate or are slow on machines without VNNI, and it fuses the
  product of the two scales into an operator that has one scale for all rows. Quantized tensors of ONNX have no scale
  per row that a call finds, so this scheme cannot be written as QuantizeLinear and DequantizeLinear.
- w8a8_static is: QuantizeLinear and DequantizeLinear around the activations (QDQ), DequantizeLinear behind the codes,
  and a MatMul, which runtimes fuse into a product of codes.
- Every other weight is dequantized by nodes of the graph, which ONNX Runtime computes once, when it loads the file.
  For w8a16 these are Cast and Mul: DequantizeLinear before a MatMul is fused into a kernel that rounds activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.nn.compressed import CompressedModule
from pykd.nn.linear_4bit import Weight4bit
from pykd.nn.linear_8bit import LAYER_SCHEMES, StaticInput, Weight8bit
from pykd.nn.linear_16bit import Weight16bit
from pykd.ops.int4_r16 import groups_of, pack_nibbles, table_of, unpack_nibbles

#: Block sizes of MatMulNBits.
BLOCKS = (16, 32, 64, 128, 256)
ZERO_POINT = 128


def block_of(columns: int, group_size: int, *, rounds: bool) -> int | None:
    """The block of MatMulNBits that fits a group size: the largest that divides it; None if none does.

    A single group may be cut at will. rounds: activations are rounded per group, so only the group itself fits.

    >>> block_of(384, 96, rounds=False), block_of(384, 24, rounds=False), block_of(384, 96, rounds=True)
    (32, None, None)
    """
    size, number, _, _ = groups_of(columns, group_size)
    if rounds:
        return size if size in BLOCKS else None
    if number == 1:
        return max([block for block in BLOCKS if block <= columns], default=BLOCKS[0])
    return max([block for block in BLOCKS if size % block == 0], default=None)


class Nibbles(nn.Module):
    """A 4-bit matrix [rows, columns]: for products, MatMulNBits where it fits; for lookups, nibbles and arithmetic."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None

    def __init__(self, weight: Weight4bit) -> None:
        super().__init__()
        qweight, scales, zeros = (None if t is None else t.detach().cpu() for t in weight._tensors())
        assert qweight is not None and scales is not None
        self.rows, self.columns, self.rounds = weight.rows, weight.columns, weight.inputs == "int8"
        size, number, _, _ = groups_of(weight.columns, weight.group_size)
        entries = table_of(weight.code)
        block = None if entries is not None else block_of(weight.columns, size, rounds=self.rounds)
        self.native, self.size = block is not None, block or size
        blocks = -(-weight.columns // self.size)
        group = torch.arange(blocks) * self.size // size
        points = None if zeros is None else unpack_nibbles(zeros, number)[:, group]
        codes = unpack_nibbles(qweight, weight.columns)
        packed = pack_nibbles(F.pad(codes, (0, blocks * self.size - weight.columns)))
        self.register_buffer("codes", packed.view(weight.rows, blocks, -1) if self.native else packed)
        self.register_buffer("scales", scales.float()[:, group])
        self.register_buffer("zeros", None if points is None else pack_nibbles(points))
        self.register_buffer("table", None if entries is None else torch.tensor(entries))

    def multiply(self, x: Tensor) -> Tensor:
        if not self.native:
            return F.linear(x, self._expand(self.codes, self.scales, self.zeros))
        inputs = [x, self.codes, self.scales.flatten()] + ([] if self.zeros is None else [self.zeros.flatten()])
        sizes = {"K": self.columns, "N": self.rows, "bits": 4, "block_size": self.size}
        shape = [*x.shape[:-1], self.rows]
        level = 4 if self.rounds else 1
        return _node("com.microsoft::MatMulNBits", inputs, {**sizes, "accuracy_level": level}, x.dtype, shape)

    def look_up(self, ids: Tensor) -> Tensor:
        return self._expand(self.codes[ids], self.scales[ids], None if self.zeros is None else self.zeros[ids])

    def matrix(self) -> Tensor:
        return self._expand(self.codes, self.scales, self.zeros)

    def _expand(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """[..., columns] from packed rows."""
        if self.native:
            codes = codes.flatten(-2)
        blocks = scales.shape[-1]
        levels = _nibbles(codes, blocks * self.size).view(*codes.shape[:-1], blocks, self.size)
        if self.table is not None:
            values = self.table[levels.long()]
        else:
            values = levels - (8.0 if zeros is None else _nibbles(zeros, blocks)[..., None])
        return (values * scales[..., None]).flatten(-2)[..., : self.columns]


def _nibbles(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes as float32; by arithmetic, because the exporter gives shifts of bytes a wrong type."""
    values = packed.float()
    high = (values / 16).floor()
    return torch.stack((values - 16 * high, high), dim=-1).flatten(-2)[..., :count]


class Bytes(nn.Module):
    """An int8 matrix [rows, columns] with a scale per row, or per row and group."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Weight8bit) -> None:
        super().__init__()
        codes, scales = (tensor.detach().cpu() for tensor in weight._tensors())
        self.rows, self.columns, self.static = weight.rows, weight.columns, weight.static
        self.rounds = weight.scheme != "w8a16"
        if scales.dim() == 2:
            assert weight.group_size is not None
            size = groups_of(weight.columns, weight.group_size).size
            scales = scales.repeat_interleave(size, dim=1)[:, : weight.columns]
        self.register_buffer("codes", (codes.short() + ZERO_POINT).to(torch.uint8) if self.rounds else codes)
        self.register_buffer("scales", scales)

    def multiply(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return F.linear(x, self.matrix())
        if self.static is not None:
            return self._between_quantized(x, self.static)
        scale = (_greatest(x) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        zeros = [torch.tensor(ZERO_POINT, dtype=torch.uint8)] * 2
        inputs = [((x / scale).round() + ZERO_POINT).to(torch.uint8), self.codes.t(), *zeros]
        sums = _node("MatMulInteger", inputs, {}, torch.int32, [*x.shape[:-1], self.rows])
        return sums.float() * scale * self.scales  # in this order: see the head of the file

    def _between_quantized(self, x: Tensor, static: StaticInput) -> Tensor:
        """The product by QuantizeLinear and DequantizeLinear. Code -128, which our kernels leave out, is cut off."""
        grid = [torch.tensor(static.scale), torch.tensor(static.zero + ZERO_POINT, dtype=torch.uint8)]
        x = x.clamp_min((-127 - static.zero) * static.scale)
        codes = _node("QuantizeLinear", [x, *grid], {}, torch.uint8, [*x.shape])
        rounded = _node("DequantizeLinear", [codes, *grid], {}, x.dtype, [*x.shape])
        zeros = torch.full((self.rows,), ZERO_POINT, dtype=torch.uint8)
        weight = _node(
            "DequantizeLinear", [self.codes.t(), self.scales, zeros], {"axis": 1}, x.dtype, [self.columns, self.rows]
        )
        # Of a matrix and a bias ONNX Runtime makes a Gemm, before it looks for codes: hence the third axis.
        return rounded @ weight if x.dim() > 2 else (rounded[None] @ weight)[0]

    def look_up(self, ids: Tensor) -> Tensor:
        return self._expand(self.codes[ids], self.scales[ids])

    def matrix(self) -> Tensor:
        return self._expand(self.codes, self.scales)

    def _expand(self, codes: Tensor, scales: Tensor) -> Tensor:
        values = codes.float() - ZERO_POINT if self.rounds else codes.float()
        return values * (scales if scales.dim() == codes.dim() else scales[..., None])


class Halves(nn.Module):
    """A matrix [rows, columns] in bfloat16 or float16, computed in float32."""

    values: Tensor
    rounds = False

    def __init__(self, weight: Weight16bit) -> None:
        super().__init__()
        self.register_buffer("values", weight._values().detach().cpu())

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def look_up(self, ids: Tensor) -> Tensor:
        return self.values[ids].float()

    def matrix(self) -> Tensor:
        return self.values.float()


def _greatest(x: Tensor) -> Tensor:
    """The largest magnitude of each row, [..., 1].

    Of no rows at all, as a router's deep branch may have, ONNX Runtime's reductions keep the columns: hence the
    Reshape, whose zeros stand for the sizes of its input.
    """
    most = x.abs().amax(-1, keepdim=True)
    return _node("Reshape", [most, torch.tensor([0] * (x.dim() - 1) + [1])], {}, x.dtype, [*most.shape])


def _node(name: str, inputs: list[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: list[Any]) -> Tensor:
    version = 1 if "::" in name else None
    result: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)
    return result


Matrix = Nibbles | Bytes | Halves


def matrix_of(weight: CompressedModule) -> Matrix | None:
    """The codes of a layer for a graph; None for a kind of layer that there is no form for."""
    if isinstance(weight, Weight4bit):
        return Nibbles(weight)
    if isinstance(weight, Weight8bit) and weight.scheme in LAYER_SCHEMES:
        return Bytes(weight)
    return Halves(weight) if isinstance(weight, Weight16bit) else None
