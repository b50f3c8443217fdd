"""Compressed layers as ONNX nodes: the same codes in the file, the same arithmetic in ONNX Runtime.

- int4 and uint4 become `com.microsoft::MatMulNBits`; its accuracy level 1 keeps activations in float32, level 4 rounds
  them to int8 under a scale per row and block, which is what w4a8 does.
- w8a8 becomes MatMulInteger between codes shifted to uint8, with row scales and output scales multiplied one after the
  other: ONNX Runtime's CPU kernels for int8 times int8 saturate or are slow on machines without VNNI, and it fuses the
  product of the two scales into an operator that has one scale for all rows.
- Every other weight is dequantized by nodes of the graph, which ONNX Runtime computes once, when it loads the file.
  For w8a16 these are Cast and Mul: DequantizeLinear before a MatMul is fused into a kernel that rounds activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.nn import Conv2d4bit, Conv2d8bit, Linear4bit, Linear8bit, SparseConv2d, SparseLinear
from pykd.nn.compressed import CompressedModule
from pykd.nn.conv import CompressedConv2d
from pykd.nn.embedding import CompressedEmbedding
from pykd.nn.fake_quantized import QATConv2d, QATLinear
from pykd.nn.linear_4bit import Weight4bit
from pykd.nn.linear_8bit import Weight8bit
from pykd.nn.tied import Tied, TiedEmbedding, TiedLinear
from pykd.ops.activation import activate
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
        self.rows, self.columns, self.rounds = weight.rows, weight.columns, weight.scheme == "w8a8"
        if scales.dim() == 2:
            assert weight.group_size is not None
            size = groups_of(weight.columns, weight.group_size).size
            scales = scales.repeat_interleave(size, dim=1)[:, : weight.columns]
        self.register_buffer("codes", (codes.short() + ZERO_POINT).to(torch.uint8) if self.rounds else codes)
        self.register_buffer("scales", scales)

    def multiply(self, x: Tensor) -> Tensor:
        if not self.rounds:
            return F.linear(x, self.matrix())
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = ((x / scale).round() + ZERO_POINT).to(torch.uint8)
        zero = torch.tensor(ZERO_POINT, dtype=torch.uint8)
        shape = [*x.shape[:-1], self.rows]
        sums = _node("MatMulInteger", [rounded, self.codes.t(), zero, zero], {}, torch.int32, shape)
        return sums.float() * scale * self.scales  # in this order: see the head of the file

    def look_up(self, ids: Tensor) -> Tensor:
        return self._expand(self.codes[ids], self.scales[ids])

    def matrix(self) -> Tensor:
        return self._expand(self.codes, self.scales)

    def _expand(self, codes: Tensor, scales: Tensor) -> Tensor:
        values = codes.float() - ZERO_POINT if self.rounds else codes.float()
        return values * (scales if scales.dim() == codes.dim() else scales[..., None])


def _node(name: str, inputs: list[Tensor], attributes: dict[str, Any], dtype: torch.dtype, shape: list[Any]) -> Tensor:
    version = 1 if "::" in name else None
    result: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)
    return result


Matrix = Nibbles | Bytes


class OnnxLayer(nn.Module):
    """A layer over a packed matrix."""

    matrix: Matrix

    @property
    def weight(self) -> Tensor:
        """The dense weight, for model code that asks a layer's weight for its dtype."""
        return self.matrix.matrix()


class OnnxLinear(OnnxLayer):
    """A linear layer over a packed matrix, with its bias and activation."""

    bias: Tensor | None

    def __init__(self, matrix: Matrix, bias: Tensor | None, activation: str | None = None) -> None:
        super().__init__()
        self.matrix, self.activation = matrix, activation
        self.register_buffer("bias", None if bias is None else bias.detach().float().cpu())

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.multiply(x)
        return activate(y if self.bias is None else y + self.bias, self.activation)


class OnnxEmbedding(OnnxLayer):
    """A lookup in a packed matrix."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.look_up(ids)


class OnnxConv2d(OnnxLayer):
    """A convolution: 1x1 ones that round their inputs multiply codes, others convolve with the dequantized weight."""

    def __init__(self, conv: CompressedConv2d, matrix: Matrix) -> None:
        super().__init__()
        self.matrix, self.conv = matrix, conv.to_conv2d()
        self.conv.weight = nn.Parameter(torch.empty(0))  # comes from the matrix
        self.shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        self.multiplies = conv.pointwise and matrix.rounds

    def forward(self, x: Tensor) -> Tensor:
        if not self.multiplies:
            weight = self.matrix.matrix().view(self.shape)
            found: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
            return found
        pixels = x[..., :: self.conv.stride[0], :: self.conv.stride[1]].movedim(-3, -1)
        y = self.matrix.multiply(pixels)
        return (y if self.conv.bias is None else y + self.conv.bias).movedim(-1, -3)


def to_onnx_layers(model: nn.Module) -> list[str]:
    """Replace every compressed layer of `model` in place; returns what a reader of the file should know.

    Raises ArtifactError for a layer that ONNX nodes cannot stand for.
    """
    matrices: dict[CompressedModule, Matrix] = {}
    made: dict[nn.Module, nn.Module] = {}
    sparse = 0
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (QATLinear, QATConv2d)):
            raise ArtifactError(f"module {name!r} is being trained for quantization: call pykd.convert_qat first.")
        if not isinstance(module, CompressedModule):
            continue
        if module not in made:
            made[module] = _form(name, module, matrices)
        sparse += isinstance(module, (SparseLinear, SparseConv2d)) or getattr(module, "nnz", None) is not None
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, made[module])
    return [f"{sparse} pruned layers hold their zeros: ONNX has no sparse product"] if sparse else []


def _form(name: str, module: CompressedModule, matrices: dict[CompressedModule, Matrix]) -> nn.Module:
    source = module.source if isinstance(module, Tied) else module
    if isinstance(source, (SparseLinear, SparseConv2d)):
        return source.to_dense()
    known = isinstance(source, Weight4bit) or (isinstance(source, Weight8bit) and source.scheme in ("w8a8", "w8a16"))
    if not known:
        scheme = getattr(source, "scheme", None)
        told = f" with scheme {scheme!r}" if scheme else ""
        raise ArtifactError(f"module {name!r} is a {type(source).__name__}{told}, which has no form in ONNX here.")
    if source not in matrices:
        assert isinstance(source, (Weight4bit, Weight8bit))
        matrices[source] = Nibbles(source) if isinstance(source, Weight4bit) else Bytes(source)
    matrix = matrices[source]
    if matrix.rounds and isinstance(matrix, Nibbles) and not matrix.native:
        raise ArtifactError(
            f"module {name!r} rounds activations in groups of {getattr(source, 'group_size', '?')}, which MatMulNBits "
            f"does not: it has blocks of {', '.join(map(str, BLOCKS))}. Quantize with such a group_size, or to w4a16."
        )
    if isinstance(module, (CompressedEmbedding, TiedEmbedding)):
        return OnnxEmbedding(matrix)
    if isinstance(module, (Conv2d4bit, Conv2d8bit)):
        return OnnxConv2d(module, matrix)
    assert isinstance(module, (Linear4bit, Linear8bit, TiedLinear))
    return OnnxLinear(matrix, module.bias, getattr(module, "activation", None))
