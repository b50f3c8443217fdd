"""Linear layers whose pruned weights are gone: in the file, in memory and in the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pykd.nn.codecs.bitmask import pack
from pykd.nn.codecs.sparse_formats import choose_format, decode, encode, filled_mask, index_shapes
from pykd.nn.compressed import CompressedModule
from pykd.nn.quantized_times import quantized_times
from pykd.ops.bitmask import PackedSparse, bitmask_expand, check_packed, unpack_bits
from pykd.ops.sparse_linear import sparse_linear
from pykd.ops.sparse_tuning import gain, measure


class SparseWeight(CompressedModule):
    """A matrix [rows, columns] as `bitmask` and `values` (`pykd.ops.bitmask`), trainable in its kept weights only.

    `values` is the parameter, so no optimizer, weight decay or momentum can revive a pruned weight. `format` is how
    files say which weights are kept (`pykd.nn.codecs.sparse_formats`); in memory it is the bitmask. Saving checks the
    one against the other, as loading does.
    """

    bitmask: Tensor
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, rows: int, columns: int, nnz: int, bias: bool, dtype: torch.dtype, device: Any, format: str = "bitmask"
    ) -> None:
        super().__init__(dtype)
        self.rows, self.columns, self.format = rows, columns, format
        self.values = nn.Parameter(torch.zeros(nnz, dtype=dtype, device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows, dtype=dtype, device=device)) if bias else None)
        shapes = index_shapes(format, rows, columns, nnz).items()
        self._register({name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in shapes})

    def _take(self, weight: Tensor, matrix: Tensor, mask: Tensor | None, bias: Tensor | None, format: str) -> None:
        """Fill the skeleton from a dense parameter seen as a matrix; the bias is shared, the values are a copy."""
        kept = filled_mask(matrix.detach(), format) if mask is None else mask
        packed = pack(matrix.detach(), kept)
        self.format = choose_format(kept, format)
        self._register({"bitmask": packed.bitmask}, persistent=self.format == "bitmask")
        self.values = nn.Parameter(packed.values, requires_grad=weight.requires_grad)
        self.bias = bias  # type: ignore[assignment]
        self.finalize()

    def _shown_format(self) -> str:
        return "" if self.format == "bitmask" else f", format={self.format}"

    @property
    def packed(self) -> PackedSparse:
        """The weight as the ops take it."""
        return PackedSparse(self._bits(), self.values, self.columns)

    @property
    def mask(self) -> Tensor:
        """bool [rows, columns], True where a weight is kept."""
        return unpack_bits(self._bits(), self.columns)

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned, in [0, 1]."""
        cells = self.rows * self.columns
        return 1.0 - (self.values.numel() / cells if cells else 0.0)

    def tune(self, rows: Sequence[int] = (1, 16, 128)) -> dict[str, Any]:
        """Measure dense against each sparse kernel on this machine; calls go by the result from now on.

        rows: how many rows of activations (tokens, pixels) a call will have; see `pykd.ops.sparse_tuning.measure` for
        what the measurement holds for and where it is kept.

        Returns a JSON-able dict: `gain`, how many times faster than dense the choice is (geometric mean over rows),
        `routes`, rows -> what was chosen, and `note`, the same in words; `us`, rows -> microseconds of the choice, and
        `bytes` in a file; `quantized`, what w8a8 and w4a16 of the same layer would take (`quantized_times`): reported,
        not applied. Empty where there is nothing to choose.
        """
        times = measure(self.packed, rows=rows)
        if not times:
            return {}
        routes = {str(number): min(of, key=lambda name: of[name]) for number, of in times.items()}
        ratio = gain(times)
        note = (
            "no gain here: computed dense" if set(routes.values()) == {"dense"} else f"{ratio:.2f}x faster than dense"
        )
        return {
            "gain": round(ratio, 3),
            "routes": routes,
            "note": note,
            "us": {str(number): round(min(of.values()), 1) for number, of in times.items()},
            "bytes": sum(tensor.nbytes for name, tensor in self.state_dict().items() if name != "bias"),
            "quantized": quantized_times(self.packed, rows),
        }

    # The layouts of the kernels belong to the op, which follows edits of `values`; here the index of the format becomes
    # the bitmask, and damage is refused.

    def _bits(self) -> Tensor:
        """The bitmask; before `finalize`, when loaders already look at weights, from the index of the format."""
        if "bitmask" in self._buffers:
            return self.bitmask
        index = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        return decode(index, self.format, self.rows, self.columns, self.values.numel())

    def _pack(self) -> None:
        if "bitmask" not in self._buffers:
            self._register({"bitmask": self._bits()}, persistent=False)
        check_packed(self.packed)

    def _unpack(self) -> None:
        if "bitmask" in self._non_persistent_buffers_set:
            self._register(self._canonical())

    def _canonical(self) -> dict[str, Tensor]:
        return encode(self.mask, self.format) if "bitmask" in self._non_persistent_buffers_set else {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.finalized and self.device.type != "meta":
            check_packed(self.packed)
        super()._save_to_state_dict(destination, prefix, keep_vars)


class SparseLinear(SparseWeight):
    """`nn.Linear` that stores and multiplies only the weights that were not pruned.

    Memory: ``out * ceil(in / 8)`` bytes of bitmask and one value per kept weight; files say which weights are kept in
    the layer's `format` (`pykd.nn.codecs.sparse_formats`). While `values` needs a
    gradient the forward pass makes the weight dense; otherwise it runs the kernels of
    `pykd.ops.sparse_linear.sparse_linear`, which also documents infinities, NaN and dtypes.

    >>> linear = nn.Linear(8, 4)
    >>> _ = nn.init.zeros_(linear.weight[:, ::2].detach())
    >>> layer = SparseLinear.from_linear(linear)
    >>> layer
    SparseLinear(in_features=8, out_features=4, bias=True, sparsity=0.500, format=4x1)
    >>> torch.allclose(layer(torch.ones(1, 8)), linear(torch.ones(1, 8)), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        format: str = "bitmask",
    ) -> None:
        """An empty layer with room for `nnz` values; `from_linear` is the usual way."""
        super().__init__(out_features, in_features, nnz, bias, dtype, device, format)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        mask: Tensor | None = None,
        format: str = "auto",
        rows: Sequence[int] | None = None,
    ) -> Self:
        """The layer without the weights that `mask` prunes.

        Args:
            linear: the layer; it is not changed, its bias is shared.
            mask: boolean [out, in], True = kept; by default weight != 0, and of a block or N:M format's zeros those
                that it keeps beside them.
            format: how files say which weights are kept: "bitmask", "csr16", a block "RxC" such as "4x1" or "16x16",
                a pattern "N:M" such as "2:4"; "block" and "n:m" are the smallest of their kind that the mask fits, and
                "auto" the smallest of all (`pykd.nn.codecs.sparse_formats`).
            rows: how many rows of activations calls will have: measured at once, see `tune`.

        Raises:
            ValueError: the mask is not boolean or not of the weight's shape, or does not fit the format.
        """
        dtype, device = linear.weight.dtype, linear.weight.device
        layer = cls(linear.in_features, linear.out_features, 0, bias=False, dtype=dtype, device=device)
        layer._take(linear.weight, linear.weight, mask, linear.bias, format)
        if rows is not None:
            layer.tune(rows)
        return layer.train(linear.training)

    def spec(self) -> dict[str, Any]:
        return {
            "type": "SparseLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "nnz": self.values.numel(),
            "bias": self.bias is not None,
            "dtype": str(self.values.dtype).removeprefix("torch."),
            "format": self.format,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        options: dict[str, Any] = {"bias": spec["bias"], "dtype": getattr(torch, spec["dtype"]), "device": device}
        options["format"] = spec.get("format", "bitmask")  # files of earlier versions know no other
        return cls(spec["in_features"], spec["out_features"], spec["nnz"], **options)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.packed, self.bias)

    def dequantize(self) -> Tensor:
        return bitmask_expand(self.packed)

    def to_dense(self) -> nn.Linear:
        return self.to_linear()

    def to_linear(self) -> nn.Linear:
        """The ordinary layer with zeros where weights were pruned; shares the bias."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.values.dtype)
        dense.weight = nn.Parameter(self.dequantize().detach(), requires_grad=self.values.requires_grad)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, sparsity={self.sparsity:.3f}{self._shown_format()}"
