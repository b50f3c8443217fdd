"""Linear layers with int8 weights, activations rounded or kept; what convolutions and embeddings share with them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.errors import nearest
from pykd.nn.activation import followed_by
from pykd.nn.codecs.eight_bit import EightBit, dequantize_8bit, quantize_8bit
from pykd.nn.compressed import CompressedModule, dense_linear, empty_bias
from pykd.ops.activation import activate, check_activation
from pykd.ops.bitmask import pack_bits, unpack_bits
from pykd.ops.dispatch import DTYPE_CODES, native
from pykd.ops.encoder_layer_8bit import Packed
from pykd.ops.int4_r16 import groups_of
from pykd.ops.int8_r16 import pack_r16, unpack_r16
from pykd.ops.linear_8bit import MOST_FEATURES, SCHEMES_8BIT, check_static, linear_8bit
from pykd.ops.sparse_8bit import least_rows, pack_codes, sparse_8bit, unpack_codes

#: A weight of at most this density is also kept as panels, 0.75 bytes a weight more at most, where those win at
#: `MANY_ROWS` rows of activations; one that is kept as panels alone may be denser.
PANELS_DENSITY = 0.25
MANY_ROWS = 128

#: Activations are rounded under one scale and zero point, which calibration has chosen.
STATIC = "w8a8_static"
#: Scheme of a layer -> that of `linear_8bit`.
LAYER_SCHEMES: dict[str, str] = {**{name: name for name in SCHEMES_8BIT}, STATIC: "w8a8"}


class StaticInput(NamedTuple):
    """How "w8a8_static" rounds every activation of a layer: x = scale * (code - zero), codes in -127..127.

    scale: above 0, exact in float32; zero: the code of 0.
    """

    scale: float
    zero: int


class Weight8bit(CompressedModule):
    """A weight matrix [rows, columns] in int8 with a float32 scale per row; `int8_r16` in the memory of a CPU.

    With a `group_size` so many columns of a row share a scale ("w8a16" only, scales [rows, groups]); no kernel knows
    such weights: they stay as in files and are unpacked to a dense weight in each call.

    scheme: "w8a8" (activations are rounded to int8, with a scale per row of them), "w8a8_static" (with the scale and
    zero point `static`, always the same) or "w8a16" (they are kept).

    Files hold `qweight` int8 [rows, columns] and `scales` [rows]; or, where enough codes are zero that it is smaller,
    `bitmask` uint8 [rows, ceil(columns / 8)] and `qvalues` int8 [nnz] instead of `qweight`. Where that makes calls of
    many rows faster (`pykd.ops.sparse_8bit`), a pruned w8a8 weight is in memory as `panels`, two to four bytes a
    kept code, beside `packed`, or alone when it wins at every number of rows: the results are the same bits.
    """

    qweight: Tensor
    bitmask: Tensor
    qvalues: Tensor
    scales: Tensor
    bias: nn.Parameter | None
    activation: str | None = None
    #: Rows of activations from which `panels` serve.
    _panels_from: float = math.inf
    #: Whether the weight is multiplied with: else its codes stay a row each, as a lookup wants them.
    multiplies = True

    def __init__(
        self, rows: int, columns: int, scheme: str, group_size: int | None = None, static: StaticInput | None = None
    ) -> None:
        if scheme not in LAYER_SCHEMES:
            raise ValueError(nearest("8-bit scheme", scheme, LAYER_SCHEMES))
        if (static is None) == (scheme == STATIC):
            raise ValueError(f"a scale of the activations goes with scheme {STATIC!r} and only it, got {scheme!r}")
        if static is not None:
            check_static("w8a8", *static)
        if group_size is not None and scheme != "w8a16":
            raise ValueError(f"a scale per group goes with scheme 'w8a16' only, got {scheme!r} with {group_size}")
        super().__init__(torch.float32)
        self.rows, self.columns, self.scheme, self.group_size = rows, columns, scheme, group_size
        self.static = static
        self.nnz: int | None = None

    def _quantize(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        tensors = quantize_8bit(weight, group_size=self.group_size)
        kept = int(tensors.qweight.count_nonzero())
        self.nnz = kept if self.rows * -(-self.columns // 8) + kept < tensors.qweight.numel() else None
        self._register(self._stored(tensors))

    def _register_empty(self, spec: dict[str, Any], device: torch.device | str | None) -> None:
        self.dtype, self.nnz = getattr(torch, spec["dtype"]), spec["nnz"]
        groups = () if self.group_size is None else (groups_of(self.columns, self.group_size).number,)
        scales = torch.zeros(self.rows, *groups, device=device)
        if self.nnz is None:
            codes = torch.zeros(self.rows, self.columns, dtype=torch.int8, device=device)
            self._register({"qweight": codes, "scales": scales})
            return
        bitmask = torch.zeros(self.rows, -(-self.columns // 8), dtype=torch.uint8, device=device)
        qvalues = torch.zeros(self.nnz, dtype=torch.int8, device=device)
        self._register({"bitmask": bitmask, "qvalues": qvalues, "scales": scales})

    def _spec(self) -> dict[str, Any]:
        groups: dict[str, Any] = {} if self.group_size is None else {"group_size": self.group_size}
        if self.static is not None:
            groups |= {"input_scale": self.static.scale, "input_zero": self.static.zero}
        return {"scheme": self.scheme, **groups, "nnz": self.nnz, "dtype": str(self.dtype).removeprefix("torch.")}

    def _matrix(self) -> Tensor:
        return dequantize_8bit(self._tensors(), group_size=self.group_size).to(self.dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        """x W^T + bias, and the activation (by default the layer's own), from whatever layout is resident."""
        activation = activation or self.activation
        if self.group_size is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = dequantize_8bit(self._tensors(), group_size=self.group_size).to(wide)
            y = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
            return activate(y, activation).to(x.dtype)
        packed, panels = self._buffers.get("packed"), self._buffers.get("panels")
        if panels is not None and x.dtype in DTYPE_CODES and x.shape[:-1].numel() >= self._panels_from:
            return sparse_8bit(x, panels, self.scales, bias=bias, activation=activation)
        options: dict[str, Any] = {"bias": bias, "scheme": self.scheme, "activation": activation}
        if self.static is not None:
            options |= {"scheme": "w8a8", "input_scale": self.static.scale, "input_zero": self.static.zero}
        if packed is not None:
            return linear_8bit(x, packed, out_features=self.rows, **options)
        return linear_8bit(x, *self._tensors(), **options)

    def _tensors(self) -> EightBit:
        """The dense codes and scales, made from whatever is registered."""
        packed = self._buffers.get("packed")
        if packed is not None:
            return EightBit(*unpack_r16(packed, out_features=self.rows, in_features=self.columns))
        if "qweight" in self._buffers:
            return EightBit(self.qweight, self.scales)
        panels = self._buffers.get("panels")
        if panels is not None:
            return EightBit(unpack_codes(panels, self.rows, self.columns), self.scales)
        mask = unpack_bits(self.bitmask, self.columns)
        kept = int(mask.sum())
        if kept != self.nnz:
            raise ValueError(f"bitmask keeps {kept} weights but qvalues holds {self.nnz}: the tensors are damaged")
        codes = torch.zeros(mask.shape, dtype=torch.int8, device=mask.device)
        codes[mask] = self.qvalues
        return EightBit(codes, self.scales)

    def _stored(self, tensors: EightBit) -> dict[str, Tensor]:
        if self.nnz is None:
            return tensors._asdict()
        mask = tensors.qweight != 0
        return {"bitmask": pack_bits(mask), "qvalues": tensors.qweight[mask], "scales": tensors.scales}

    # The hooks of CompressedModule: int8_r16 or panels of codes where the native kernels run, else dense codes.

    def _has_layout(self) -> bool:
        return bool(self._non_persistent_buffers_set)

    def _pack(self) -> None:
        fits = self.multiplies and self.group_size is None and self.columns <= MOST_FEATURES
        runs_natively = fits and native is not None and self.device.type == "cpu"
        if self._has_layout() or not (runs_natively or self.nnz is not None):
            return
        tensors = self._tensors()
        layout = self._layout(tensors) if runs_natively else tensors._asdict()
        self._register(layout, persistent=False)

    def _layout(self, tensors: EightBit) -> dict[str, Tensor]:
        density = 1.0 if self.nnz is None else self.nnz / (self.rows * self.columns)
        sparse = self.scheme == "w8a8" and (density <= PANELS_DENSITY or least_rows(density) <= 1)
        self._panels_from = least_rows(density) if sparse else math.inf
        if self._panels_from > MANY_ROWS:
            return {"packed": pack_r16(*tensors)}
        panels = pack_codes(tensors.qweight, pack_bits(tensors.qweight != 0))
        layout = {"panels": panels, "scales": tensors.scales}
        return layout if self._panels_from <= 1 else {**layout, "packed": pack_r16(*tensors)}

    def _unpack(self) -> None:
        if self._has_layout():
            self._register(self._canonical())

    def _canonical(self) -> dict[str, Tensor]:
        return self._stored(self._tensors()) if self._has_layout() else {}


def static_of(spec: dict[str, Any]) -> StaticInput | None:
    """The rounding of the activations that a description names."""
    return StaticInput(spec["input_scale"], spec["input_zero"]) if spec["scheme"] == STATIC else None


class Linear8bit(Weight8bit):
    """`nn.Linear` with an int8 weight: see `pykd.linear_8bit` for the arithmetic of the schemes.

    The weight is frozen; gradients flow to the input (straight through its rounding) and the bias.

    >>> Linear8bit.from_linear(nn.Linear(64, 16))(torch.zeros(2, 64)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str = "w8a8",
        group_size: int | None = None,
        *,
        activation: str | None = None,
        static: StaticInput | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(out_features, in_features, scheme, group_size, static)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scheme: str = "w8a8",
        group_size: int | None = None,
        activation: str | None = None,
        static: StaticInput | None = None,
    ) -> Self:
        """Quantize a linear layer by rounding each row to its largest magnitude / 127; the bias is shared.

        Args:
            scheme: "w8a8" rounds activations to int8 in each call (dynamic, per row), "w8a8_static" as `static` says,
                "w8a16" keeps them.
            group_size: "w8a16" only: so many inputs share a scale. Closer to the dense layer and as small, but not
                faster: see `Weight8bit`. For a whole model ``quantize(model, lambda layer, group_size:
                Linear8bit.from_linear(layer, scheme="w8a16", group_size=group_size))``.
            activation: "gelu", "gelu_tanh", "silu" or "relu", to apply to the result in the same call; None is none.
            static: "w8a8_static" only: scale and zero point of the activations.

        Raises ValueError for a group size with "w8a8" or below 1, and for `static` without its scheme or the reverse.
        """
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, scheme, group_size, activation=activation, static=static)
        layer._quantize(linear.weight)
        layer.bias = linear.bias
        layer.train(linear.training)
        layer.finalize()
        return layer

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        activation = {} if self.activation is None else {"activation": self.activation}
        return {"type": "Linear8bit", **sizes, **self._spec(), **activation}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        sizes = spec["in_features"], spec["out_features"]
        options: dict[str, Any] = {"activation": spec.get("activation"), "static": static_of(spec)}
        layer = cls(*sizes, spec["scheme"], spec.get("group_size"), **options)
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

    def as_packed(self, activation: str | None = None) -> Packed | None:
        """What an op of several layers takes of this one, with ``activation`` behind it; None where it cannot.

        It takes w8a8 layers that compute from the layout `int8_r16` at any number of rows, without an activation of
        their own.
        """
        weight, bias = self._buffers.get("packed"), self._parameters["bias"]
        plain = self.activation is None and self.scheme != "w8a16" and self._panels_from == math.inf
        if weight is None or not plain:
            return None
        if bias is not None and (bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
            return None
        scale, zero = (0.0, 0) if self.static is None else self.static
        return Packed(weight, bias, self.columns, self.rows, activation, scale, zero)

    def extra_repr(self) -> str:
        kept = "" if self.nnz is None else f", kept={self.nnz / (self.rows * self.columns):.3f}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{sizes}, bias={self.bias is not None}, scheme={self.scheme}{groups}{kept}{activation}"
