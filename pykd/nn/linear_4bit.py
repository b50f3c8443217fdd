"""Linear layers with 4-bit weights, and what they share with convolutions with 4-bit weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pykd.errors import nearest
from pykd.nn.activation import followed_by
from pykd.nn.codecs.four_bit import FourBit, quantize_4bit
from pykd.nn.compressed import CompressedModule, dense_linear, empty_bias
from pykd.ops.activation import check_activation
from pykd.ops.bitmask import pack_bits, unpack_bits
from pykd.ops.dispatch import DTYPE_CODES, native, skips_dispatcher
from pykd.ops.int4_r16 import (
    CODEBOOK,
    PAD_CODE,
    dequantize,
    groups_of,
    holds_zero,
    pack_nibbles,
    pack_r16,
    table_of,
    unpack_nibbles,
    unpack_r16,
)
from pykd.ops.linear_4bit import linear_4bit
from pykd.ops.sparse_4bit import fits, pack_kept, sparse_4bit

#: Scheme -> code of its weights; int4 with `symmetric=False` is uint4.
SCHEMES_4BIT: dict[str, str] = {"w4a16": "int4", "w4a8": "int4", "nf4": "nf4", "fp4": "fp4"}

#: Those that round activations to int8 in each call, with a scale per row and group; the others keep them.
ROUNDING_4BIT = ("w4a8",)


def is_4bit(scheme: object) -> bool:
    """Whether a scheme stores 4-bit codes: one of `SCHEMES_4BIT`, or a table of its own.

    >>> is_4bit("nf4"), is_4bit("w8a8")
    (True, False)
    """
    return isinstance(scheme, str) and (scheme in SCHEMES_4BIT or scheme.startswith(CODEBOOK))


def code_of(scheme: str, *, symmetric: bool = True) -> str:
    """The code of a 4-bit scheme's weights. Raises ValueError for an unknown scheme, or a table that cannot be one.

    >>> code_of("w4a16", symmetric=False)
    'uint4'
    """
    if not is_4bit(scheme):
        raise ValueError(nearest("4-bit scheme", scheme, (*SCHEMES_4BIT, CODEBOOK)))
    code = SCHEMES_4BIT.get(scheme, scheme)
    table_of(code)  # refuses a table that cannot be one
    if not symmetric and code != "int4":
        raise ValueError(f"symmetric=False goes with schemes 'w4a16' and 'w4a8' only, got {scheme!r}")
    return code if symmetric else "uint4"


class Weight4bit(CompressedModule):
    """A weight matrix [rows, columns] in 4 bits: canonical in files, `int4_r16` in the memory of a CPU.

    Files hold `qweight`, `scales` and for asymmetric weights `zeros` (see `pykd.ops.int4_r16`); or, where enough codes
    stand for zero that it is smaller, `bitmask` and `qvalues` (the kept codes, row by row) instead of `qweight`. Where
    one row through a pruned weight is faster by the kept codes (`pykd.ops.sparse_4bit.fits`), a CPU holds these too.
    """

    qweight: Tensor
    bitmask: Tensor
    qvalues: Tensor
    bits: Tensor
    starts: Tensor
    scales: Tensor
    bias: nn.Parameter | None
    activation: str | None = None
    #: Whether the weight is multiplied with: else its codes stay a row each, as a lookup wants them.
    multiplies = True

    def __init__(self, rows: int, columns: int, scheme: str, group_size: int | None, symmetric: bool) -> None:
        code = code_of(scheme, symmetric=symmetric)
        super().__init__(torch.float32)
        self.rows, self.columns = rows, columns
        self.scheme, self.symmetric = scheme, symmetric
        self.group_size = columns if group_size is None else group_size
        self.code = code
        self.inputs = "int8" if scheme in ROUNDING_4BIT else "keep"
        self.nnz: int | None = None
        self.scales_dtype = torch.float16

    def _take(self, tensors: FourBit, dtype: torch.dtype) -> None:
        """Register canonical tensors in the smaller of the two ways; ValueError where they do not fit the layer."""
        groups = groups_of(self.columns, self.group_size).number
        want = ((self.rows, -(-self.columns // 2)), (self.rows, groups), (self.rows, -(-groups // 2)))
        for name, tensor, shape in zip(FourBit._fields, tensors, want, strict=True):
            wanted = None if name == "zeros" and self.symmetric else shape
            got = None if tensor is None else tuple(tensor.shape)
            if got != wanted:
                raise ValueError(
                    f"{name} must be {wanted} for {self.rows} x {self.columns} weights in {self.code} with group size "
                    f"{self.group_size}, got {got}"
                )
        self.dtype, self.scales_dtype = dtype, tensors.scales.dtype
        if self.scales_dtype not in DTYPE_CODES:
            raise ValueError(f"scales must be float16, bfloat16 or float32, got {self.scales_dtype}")
        kept = int(self._kept(tensors).sum())
        sparse_bytes = self.rows * -(-self.columns // 8) + -(-kept // 2)
        self.nnz = kept if sparse_bytes < tensors.qweight.numel() else None
        self._register(self._stored(tensors))

    def _register_empty(self, spec: dict[str, Any], device: torch.device | str | None) -> None:
        """Zero-filled canonical tensors of the shapes that `spec` says."""
        self.dtype, self.nnz = getattr(torch, spec["dtype"]), spec["nnz"]
        self.scales_dtype = getattr(torch, spec.get("scales_dtype", "float16"))
        groups = groups_of(self.columns, self.group_size).number
        shapes: dict[str, tuple[int, ...]] = {"qweight": (self.rows, -(-self.columns // 2))}
        if self.nnz is not None:
            shapes = {"bitmask": (self.rows, -(-self.columns // 8)), "qvalues": (-(-self.nnz // 2),)}
        if not self.symmetric:
            shapes["zeros"] = (self.rows, -(-groups // 2))
        tensors = {name: torch.zeros(shape, dtype=torch.uint8, device=device) for name, shape in shapes.items()}
        self._register({**tensors, "scales": torch.zeros(self.rows, groups, dtype=self.scales_dtype, device=device)})

    def _spec(self) -> dict[str, Any]:
        scales = {} if self.scales_dtype == torch.float16 else {"scales_dtype": _name(self.scales_dtype)}
        return {
            "scheme": self.scheme,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "nnz": self.nnz,
            "dtype": _name(self.dtype),
            **scales,
        }

    def _matrix(self) -> Tensor:
        """The dequantized weight matrix [rows, columns] in the layer's dtype."""
        return dequantize(*self._tensors(), **self._sizes()).to(self.dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        """x W^T + bias, and the activation (by default the layer's own), from whatever layout is resident."""
        activation = activation or self.activation
        options: dict[str, Any] = {
            "bias": bias,
            "code": self.code,
            "group_size": self.group_size,
            "inputs": self.inputs,
            "activation": activation,
        }
        kept = self._buffers.get("kept")
        if kept is not None and x.numel() == self.columns and x.dtype in DTYPE_CODES and skips_dispatcher(x, bias):
            return sparse_4bit(
                x, self.bits, kept, self.starts, self.scales, code=self.code, group_size=self.group_size, bias=bias,
                activation=activation,
            )  # fmt: skip
        packed = self._buffers.get("packed")
        if packed is not None:
            return linear_4bit(x, packed, out_features=self.rows, **options)
        qweight, scales, zeros = self._tensors()
        return linear_4bit(x, qweight, scales, zeros=zeros, **options)

    # Canonical tensors (dense codes) <-> what is stored.

    def _sizes(self) -> dict[str, Any]:
        return {"code": self.code, "in_features": self.columns, "group_size": self.group_size}

    def _tensors(self) -> FourBit:
        """The dense canonical tensors, made from whatever is registered."""
        buffers = self._buffers
        packed, scales, zeros = buffers.get("packed"), buffers.get("scales"), buffers.get("zeros")
        if packed is not None:
            qweight, held, points = unpack_r16(packed, out_features=self.rows, **self._sizes())
            return FourBit(qweight, held.to(self.scales_dtype), points)
        assert scales is not None
        if "qweight" in buffers:
            return FourBit(self.qweight, scales, zeros)
        mask = unpack_bits(self.bitmask, self.columns)
        kept = int(mask.sum())
        if kept != self.nnz:
            raise ValueError(f"bitmask keeps {kept} weights but qvalues holds {self.nnz}: the tensors are damaged")
        codes = self._zero_codes(zeros).to(mask.device).expand(mask.shape).clone()
        codes[mask] = unpack_nibbles(self.qvalues, kept)
        return FourBit(pack_nibbles(codes), scales, zeros)

    def _stored(self, tensors: FourBit) -> dict[str, Tensor]:
        """State-dict name -> tensor, with the codes as bitmask and kept values when the layer is stored sparse."""
        stored = {"qweight": tensors.qweight}
        if self.nnz is not None:
            mask = self._kept(tensors)
            kept = unpack_nibbles(tensors.qweight, self.columns)[mask]
            stored = {"bitmask": pack_bits(mask), "qvalues": pack_nibbles(kept)}
        stored["scales"] = tensors.scales
        if tensors.zeros is not None:
            stored["zeros"] = tensors.zeros
        return stored

    def _kept(self, tensors: FourBit) -> Tensor:
        """bool [rows, columns]: the weights whose code does not stand for 0.0."""
        if not holds_zero(self.code):
            return torch.ones(self.rows, self.columns, dtype=torch.bool, device=tensors.scales.device)
        return unpack_nibbles(tensors.qweight, self.columns) != self._zero_codes(tensors.zeros).to(
            tensors.scales.device
        )

    def _zero_codes(self, zeros: Tensor | None) -> Tensor:
        """The code of 0.0: one for all, or per weight where zero points differ."""
        if zeros is None:
            table = table_of(self.code)
            if not holds_zero(self.code):
                raise ValueError(f"{self.code!r} has no 0.0 for pruned weights: the tensors are damaged")
            code = PAD_CODE if table is None else table.index(0.0)
            return torch.tensor(code, dtype=torch.uint8)
        groups = groups_of(self.columns, self.group_size)
        return unpack_nibbles(zeros, groups.number).repeat_interleave(groups.size, dim=1)[:, : self.columns]

    # The hooks of CompressedModule: int4_r16 where the native kernel runs, else dense codes.

    def _has_layout(self) -> bool:
        return "packed" in self._buffers or "qweight" in self._non_persistent_buffers_set

    def _pack(self) -> None:
        runs_natively = self.multiplies and native is not None and self.device.type == "cpu"
        if self._has_layout() or not (runs_natively or self.nnz is not None):
            return
        tensors = self._tensors()
        layout = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None}
        if runs_natively:
            layout = {"packed": pack_r16(*tensors, in_features=self.columns, group_size=self.group_size)}
            density = 1.0 if self.nnz is None else self.nnz / (self.rows * self.columns)
            keeps = self.inputs == "keep" and self.scales_dtype == torch.float16
            if keeps and fits(density, self.code, self.columns, self.group_size):
                layout["scales"] = tensors.scales
                layout |= pack_kept(unpack_nibbles(tensors.qweight, self.columns), self._kept(tensors))
        self._register(layout, persistent=False)

    def _unpack(self) -> None:
        if self._has_layout():
            self._register(self._canonical())

    def _canonical(self) -> dict[str, Tensor]:
        return self._stored(self._tensors()) if self._has_layout() else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Linear4bit(Weight4bit):
    """`nn.Linear` with a 4-bit weight: see `pykd.linear_4bit` for the arithmetic, `from_linear` for how to make one.

    The weight is frozen; gradients flow to the input (with w4a8, straight through its rounding) and the bias.

    >>> layer = Linear4bit.from_linear(nn.Linear(64, 16), scheme="nf4", group_size=32)
    >>> layer(torch.zeros(2, 64)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        group_size: int | None = 32,
        symmetric: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(out_features, in_features, scheme, group_size, symmetric)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scheme: str = "w4a16",
        group_size: int | None = 32,
        symmetric: bool = True,
        activation: str | None = None,
    ) -> Self:
        """Quantize a linear layer by plain rounding (`pykd.nn.codecs.four_bit.quantize_4bit`).

        Args:
            linear: the layer; it is not changed, its bias is shared.
            scheme: "w4a16" (int4), "nf4" or "fp4"; "w4a8" is int4, and rounds activations to int8 in each call, with a
                scale per row and group.
            group_size: inputs that share a scale; None is the whole row.
            symmetric: for w4a16 and w4a8: False stores an integer zero point per group.
            activation: "gelu", "gelu_tanh", "silu" or "relu", to apply to the result in the same call; None is none.
        """
        layer = cls(linear.in_features, linear.out_features, scheme, group_size, symmetric, activation=activation)
        return layer._fill(linear, quantize_4bit(linear.weight, code=layer.code, group_size=layer.group_size))

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        tensors: FourBit,
        *,
        scheme: str = "w4a16",
        group_size: int | None = 32,
        symmetric: bool = True,
        activation: str | None = None,
    ) -> Self:
        """The layer with codes that were chosen elsewhere, and the bias of `linear`.

        tensors: canonical, see `pykd.ops.int4_r16`; `zeros` exactly when not symmetric. Scales keep their type in
        files: float16, bfloat16 or float32. Raises ValueError where the tensors do not fit the layer.

        >>> linear = nn.Linear(64, 16)
        >>> tensors = quantize_4bit(linear.weight, code="nf4", group_size=32)
        >>> layer = Linear4bit.from_codes(linear, tensors, scheme="nf4", group_size=32)
        """
        layer = cls(linear.in_features, linear.out_features, scheme, group_size, symmetric, activation=activation)
        return layer._fill(linear, tensors)

    def _fill(self, linear: nn.Linear, tensors: FourBit) -> Self:
        self._take(tensors, linear.weight.dtype)
        self.bias = linear.bias
        self.train(linear.training)
        self.finalize()
        return self

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        activation = {} if self.activation is None else {"activation": self.activation}
        return {"type": "Linear4bit", **sizes, **self._spec(), **activation}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        names = ("in_features", "out_features", "scheme", "group_size", "symmetric")
        layer = cls(*(spec[name] for name in names), activation=spec.get("activation"))
        layer._register_empty(spec, device)
        empty_bias(layer, spec, device)
        return layer

    def dequantize(self) -> Tensor:
        return self._matrix()

    def to_dense(self) -> nn.Module:
        return followed_by(self.to_linear(), self.activation)

    def to_linear(self) -> nn.Linear:
        """The ordinary linear layer with the dequantized weight, without an activation; shares the bias."""
        return dense_linear(self)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """The layer's result, and ``activation`` applied to it in the same call where the layer has none of its own."""
        return self._multiply(x, self._parameters["bias"], activation)  # nn.Module's attributes cost microseconds

    def extra_repr(self) -> str:
        kept = "" if self.nnz is None else f", kept={self.nnz / (self.rows * self.columns):.3f}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, group_size={self.group_size}{'' if self.symmetric else ', asymmetric'}{kept}"
            f"{'' if self.activation is None else f', activation={self.activation}'}"
        )
