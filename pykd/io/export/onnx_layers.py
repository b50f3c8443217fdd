"""Compressed layers as modules that torch.onnx traces: the same codes, in nodes that ONNX Runtime has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError
from pykd.io.export.onnx_matrices import BLOCKS, Matrix, Nibbles, matrix_of
from pykd.nn import Linear4bit, Linear8bit, Linear16bit, SparseConv2d, SparseLinear
from pykd.nn.compressed import CompressedModule
from pykd.nn.conv import CompressedConv2d
from pykd.nn.embedding import CompressedEmbedding
from pykd.nn.fake_quantized import QATConv2d, QATLinear
from pykd.nn.tied import Tied, TiedEmbedding, TiedLinear
from pykd.ops.activation import activate


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
    if source not in matrices:
        made = matrix_of(source)
        if made is None:
            told = f" with scheme {source.scheme!r}" if hasattr(source, "scheme") else ""
            raise ArtifactError(f"module {name!r} is a {type(source).__name__}{told}, which has no form in ONNX here.")
        matrices[source] = made
    matrix = matrices[source]
    if matrix.rounds and isinstance(matrix, Nibbles) and not matrix.native:
        raise ArtifactError(
            f"module {name!r} rounds activations in groups of {getattr(source, 'group_size', '?')}, which MatMulNBits "
            f"does not: it has blocks of {', '.join(map(str, BLOCKS))}. Quantize with such a group_size, or to w4a16."
        )
    if isinstance(module, (CompressedEmbedding, TiedEmbedding)):
        return OnnxEmbedding(matrix)
    if isinstance(module, CompressedConv2d):
        return OnnxConv2d(module, matrix)
    assert isinstance(module, (Linear4bit, Linear8bit, Linear16bit, TiedLinear))
    return OnnxLinear(matrix, module.bias, getattr(module, "activation", None))
