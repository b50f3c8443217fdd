"""What every compressed layer has in common: canonical tensors in files, a layout of its own for each device."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class CompressedModule(nn.Module, abc.ABC):
    """A layer whose weight is stored compressed, and which computes from a layout made for the device it is on.

    Files hold the canonical tensors: device-neutral, named, described by `spec()`. `state_dict()` always yields exactly
    those and `load_state_dict()` takes exactly those, whatever layout is resident. `finalize()` replaces them by the
    device's layout (one copy stays in memory); moving the module to another device undoes and redoes that. The
    element types of compressed tensors never change: `.half()` or `.to(torch.bfloat16)` convert floating-point
    parameters such as the bias, and the `dtype` that the layer reports for its dense weight.

    A subclass writes `spec`, `from_spec`, `dequantize`, `to_dense` and, if it has a device layout, the three hooks
    `_pack`, `_unpack` and `_canonical`.

    Attributes:
        dtype: element type of `weight` and `dequantize()`, the one that the dense layer had.
        finalized: whether the tensors have been filled in and the device's layout is in use.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.finalized = False

    @abc.abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON-able description: `type`, and everything `from_spec` needs to build an empty layer of the same shape."""

    @classmethod
    @abc.abstractmethod
    def from_spec(cls, spec: dict[str, Any], *, device: torch.device | str | None = None) -> Self:
        """An empty layer with its canonical tensors registered (also on `meta`): fill them, then call `finalize()`."""

    @abc.abstractmethod
    def dequantize(self) -> Tensor:
        """The dense weight, in the shape and dtype of the layer that was compressed."""

    @abc.abstractmethod
    def to_dense(self) -> nn.Module:
        """The ordinary `torch.nn` layer that computes the same function with `dequantize()` as its weight."""

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, made anew each time: for model code that asks a layer's weight for its dtype or values."""
        return self.dequantize()

    @property
    def device(self) -> torch.device:
        """Where the layer's tensors are."""
        return next(tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors)

    def finalize(self) -> None:
        """Replace the canonical tensors by the layout of their device. Does nothing on `meta`, or when already done."""
        if self.device.type != "meta":
            self._pack()
            self.finalized = True

    # Hooks. By default the canonical tensors are what the layer computes with.

    def _pack(self) -> None:
        """Replace the registered canonical tensors by non-persistent buffers in the device's layout. Idempotent."""

    def _unpack(self) -> None:
        """Undo `_pack`: register the canonical tensors again. Idempotent."""
        for name, tensor in self._canonical().items():
            self.register_buffer(name, tensor)

    def _canonical(self) -> dict[str, Tensor]:
        """The canonical tensors that are not registered under their names at the moment, made from the layout."""
        return {}

    def _register(self, tensors: dict[str, Tensor], *, persistent: bool = True) -> None:
        """Let these be the module's buffers, and no others."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    # How nn.Module reads, writes and moves its tensors.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._canonical().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)
        self.finalize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        moves = probe.device != self.device
        if moves:
            self._unpack()
        buffers = dict(self._buffers)
        self._buffers.clear()  # buffers keep their element type, which nn.Module would convert
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(buffers)
        for name, buffer in buffers.items():
            if buffer is not None:
                self._buffers[name] = _keeping_dtype(fn, buffer)
        self.dtype = probe.dtype
        if moves and self.finalized:
            self.finalize()
        return self


def empty_bias(layer: Any, spec: dict[str, Any], device: torch.device | str | None) -> None:
    """A bias of zeros, to be filled, where the description says that there is one."""
    if spec["bias"]:
        layer.bias = nn.Parameter(torch.zeros(layer.rows, dtype=layer.dtype, device=device))


def dense_linear(layer: Any) -> nn.Linear:
    """An ordinary linear layer with the dequantized weight of a compressed one and its very bias."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.dtype)
    dense.weight = nn.Parameter(layer.dequantize())
    dense.bias = layer.bias
    return dense


def _keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    result = fn(tensor)
    if result.dtype == tensor.dtype:
        return result
    return tensor if result.device == tensor.device else tensor.to(result.device)
