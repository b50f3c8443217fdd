"""Linear layers stored in 16 bits: half the file of float32, computed in the dtype of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from pykd.errors import nearest
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT, round_16bit
from pykd.nn.compressed import CompressedModule, dense_linear, empty_bias
from pykd.ops.bitmask import pack_bits, unpack_bits

#: Dtypes that hold every value of both 16-bit types.
WIDE = (torch.float32, torch.float64)


class Weight16bit(CompressedModule):
    """A weight matrix [rows, columns] in bfloat16 or float16; in memory in the layer's dtype, where it is multiplied.

    Products are those of a dense layer that holds the rounded weight: no slower and no faster. `.to(torch.bfloat16)`,
    as for any layer, halves memory too, and multiplies in 16 bits.

    Files hold `values` [rows, columns] in the 16-bit type; or, where enough of them are zero that it is smaller,
    `bitmask` uint8 [rows, ceil(columns / 8)] and `values` [nnz].
    """

    values: Tensor
    bitmask: Tensor
    dense: Tensor
    bias: nn.Parameter | None
    #: Whether the weight is multiplied with: else its rows are only looked up.
    multiplies = True

    def __init__(self, rows: int, columns: int, scheme: str) -> None:
        if scheme not in SCHEMES_16BIT:
            raise ValueError(nearest("16-bit scheme", scheme, SCHEMES_16BIT))
        super().__init__(torch.float32)
        self.rows, self.columns, self.scheme = rows, columns, scheme
        self.nnz: int | None = None

    def _quantize(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        values = round_16bit(weight, self.scheme)
        kept = int(values.count_nonzero())
        self.nnz = kept if self.rows * -(-self.columns // 8) + 2 * kept < values.nbytes else None
        self._register(self._stored(values))

    def _register(self, tensors: dict[str, Tensor], *, persistent: bool = True) -> None:
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    def _register_empty(self, spec: dict[str, Any], device: torch.device | str | None) -> None:
        self.dtype, self.nnz = getattr(torch, spec["dtype"]), spec["nnz"]
        options: dict[str, Any] = {"dtype": SCHEMES_16BIT[self.scheme], "device": device}
        if self.nnz is None:
            self._register({"values": torch.zeros(self.rows, self.columns, **options)})
            return
        bitmask = torch.zeros(self.rows, -(-self.columns // 8), dtype=torch.uint8, device=device)
        self._register({"bitmask": bitmask, "values": torch.zeros(self.nnz, **options)})

    def _spec(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "nnz": self.nnz, "dtype": str(self.dtype).removeprefix("torch.")}

    def _matrix(self) -> Tensor:
        return self._values().to(self.dtype, copy=True)

    def _resident(self) -> Tensor:
        """The weight in the layer's dtype, without a copy where there is one."""
        dense = self._buffers.get("dense")
        return (self._values() if dense is None else dense).to(self.dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        return F.linear(x, self._resident(), bias)

    def _values(self) -> Tensor:
        """[rows, columns] in the 16-bit type, made from whatever is registered."""
        dense = self._buffers.get("dense")
        if dense is not None:
            return dense.to(SCHEMES_16BIT[self.scheme])
        if self.nnz is None:
            return self.values
        mask = unpack_bits(self.bitmask, self.columns)
        kept = int(mask.sum())
        if kept != self.nnz:
            raise ValueError(f"bitmask keeps {kept} weights but values holds {self.nnz}: the tensors are damaged")
        values = torch.zeros(mask.shape, dtype=self.values.dtype, device=mask.device)
        values[mask] = self.values
        return values

    def _stored(self, values: Tensor) -> dict[str, Tensor]:
        if self.nnz is None:
            return {"values": values}
        mask = values != 0
        return {"bitmask": pack_bits(mask), "values": values[mask]}

    # The hooks of CompressedModule. A dense weight is made only where it can be rounded back without loss.

    def _has_layout(self) -> bool:
        return "dense" in self._buffers

    def _pack(self) -> None:
        widened = self.multiplies and self.dtype in WIDE
        if self._has_layout() or not (widened or self.nnz is not None):
            return
        values = self._values()
        self._register({"dense": values.to(self.dtype) if widened else values}, persistent=False)

    def _unpack(self) -> None:
        if self._has_layout():
            self._register(self._canonical())

    def _canonical(self) -> dict[str, Tensor]:
        return self._stored(self._values()) if self._has_layout() else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.dtype
        super()._apply(fn, recurse)
        if self.finalized and self.dtype != before:
            self._unpack()
            self._pack()
        return self


class Linear16bit(Weight16bit):
    """`nn.Linear` with a weight in bfloat16 or float16, frozen; inputs, sums and bias keep their dtype.

    >>> Linear16bit.from_linear(nn.Linear(64, 16), scheme="bf16")(torch.zeros(2, 64)).shape
    torch.Size([2, 16])
    """

    def __init__(self, in_features: int, out_features: int, scheme: str = "bf16") -> None:
        super().__init__(out_features, in_features, scheme)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scheme: str = "bf16") -> Self:
        """Round the weight to 16 bits; the bias is shared. Raises ValueError for values beyond float16."""
        layer = cls(linear.in_features, linear.out_features, scheme)
        layer._quantize(linear.weight.detach())
        layer.bias = linear.bias
        layer.train(linear.training)
        layer.finalize()
        return layer

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return {"type": "Linear16bit", **sizes, **self._spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        layer = cls(spec["in_features"], spec["out_features"], spec["scheme"])
        layer._register_empty(spec, device)
        empty_bias(layer, spec, device)
        return layer

    def dequantize(self) -> Tensor:
        return self._matrix()

    def to_dense(self) -> nn.Module:
        return self.to_linear()

    def to_linear(self) -> nn.Linear:
        """The ordinary linear layer with the rounded weight; shares the bias."""
        return dense_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias)

    def extra_repr(self) -> str:
        kept = "" if self.nnz is None else f", kept={self.nnz / (self.rows * self.columns):.3f}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, scheme={self.scheme}{kept}"
