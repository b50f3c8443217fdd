"""Linear layer over a bitmask + values weight: schema, reference, routes, fake, autograd and the public function."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitmask import PackedSparse, bitmask_expand, bitmask_expand_reference, bitmask_gather, check_packed
from .dispatch import (
    DTYPE_CODES,
    TABLE,
    Route,
    dtype_code,
    lib,
    native,
    num_threads,
    skips_dispatcher,
)
from .sparse_linear_gpu import run_cuda
from .sparse_panels import TILE, in_quads, panels_pack
from .sparse_route import route


def sparse_linear_reference(x: Tensor, packed: PackedSparse, bias: Tensor | None = None) -> Tensor:
    """What the kernels compute, in plain torch: float32 sums over the dense weight, rounded once to the dtype of x."""
    weight = bitmask_expand_reference(packed.values, packed.bitmask, packed.in_features)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def sparse_linear(x: Tensor, packed: PackedSparse, bias: Tensor | None = None) -> Tensor:
    """Linear layer whose weight is stored as a bitmask and the kept values: ``x @ W.T + bias``.

    Args:
        x: activations [..., in_features], float32, bfloat16 or float16.
        packed: the weight, see `PackedSparse`; values in any of the three element types, not necessarily that of x.
        bias: [out_features] or None.

    Returns:
        [..., out_features] in the dtype of x; products are summed in float32. Under autocast x is converted as for
        `torch.nn.functional.linear`.

    The kernels read a layout made from `packed` at the first call and again whenever `values` was modified in place
    (by its version counter, so edits through `.data` go unseen). When `values` needs a gradient the weight is made
    dense instead, since it changes at every step. Gradients flow to x, values and bias.

    Infinities and NaN: a kept weight multiplies them as IEEE 754 says; a pruned one contributes either nothing or
    ``0 * x``, so an activation that is not finite leaves the outputs that pruned it unspecified (the value without
    it, or NaN). Rows of x never influence each other.

    Raises:
        ValueError: the shapes do not fit, or the packed weight is corrupt.
        TypeError: an element type other than the three.

    >>> packed = PackedSparse(torch.tensor([[0b101]], dtype=torch.uint8), torch.tensor([1.0, 2.0]), 3)
    >>> sparse_linear(torch.tensor([1.0, 10.0, 100.0]), packed)
    tensor([201.])
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and packed.values.requires_grad:
        _check(x, packed.values, packed.bitmask, packed.in_features, bias)
        return F.linear(x, bitmask_expand(packed).to(x.dtype), None if bias is None else bias.to(x.dtype))
    if skips_dispatcher(x, bias):
        return _sparse_linear_cpu(x, packed.values, packed.bitmask, packed.in_features, bias)
    result: Tensor = torch.ops.pykd.sparse_linear(x, packed.values, packed.bitmask, packed.in_features, bias)
    return result


def _fits(x: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None) -> bool:
    """Whether `_check` would find nothing of a call on the CPU whose values it has seen: at a fraction of its cost."""
    if bias is not None and not (bias.dtype in DTYPE_CODES and bias.is_cpu and bias.shape == bitmask.shape[:1]):
        return False
    return x.dtype in DTYPE_CODES and x.is_cpu and x.ndim > 0 and x.shape[-1] == in_features


def _check(x: Tensor, values: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"sparse_linear takes float32, bfloat16 or float16; {name} is {tensor.dtype}: convert it")
        if tensor is not None and tensor.device != bitmask.device:
            raise ValueError(f"{name} is on {tensor.device} and the weight on {bitmask.device}; move one of them")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension has to be in_features={in_features}")
    if bias is not None and bias.shape != (bitmask.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (out_features,) = ({bitmask.shape[0]},)")


# --- CPU --------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """What the CPU routes read, made from a packed weight, and what it was made from."""

    version: tuple[int, ...]
    source: weakref.ref[Tensor]  # the values it was made from
    packed: PackedSparse  # detached, contiguous
    density: float
    quads: bool  # rows keep the same columns in fours
    offsets: Tensor  # int64 [out + 1]
    tail: Tensor  # the values from row `tail_row` on, with _READ_AHEAD zeros after them
    tail_row: int
    made: dict[object, Tensor]  # "panels": the pack, a dtype: the dense weight; each once a call has needed it
    facts: dict[str, object]  # what the mask was found to be made of, once a call has asked


_layouts: dict[int, Layout] = {}  # id of the values -> layout; an entry goes when its values go

_READ_AHEAD = 16  # the kernels load up to 16 values at once, wherever the last ones they need are


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def layout_of(packed: PackedSparse) -> Layout:
    bitmask, values, _ = packed
    version = (_version(values), values.data_ptr(), _version(bitmask), bitmask.data_ptr(), values.numel())
    layout = _layouts.get(id(values))
    if layout is None or layout.version != version or layout.source() is not values:
        layout = _layouts[id(values)] = _make_layout(packed, version)
    return layout


def _make_layout(packed: PackedSparse, version: tuple[int, ...]) -> Layout:
    offsets = check_packed(packed)
    key = id(packed.values)

    def forget(gone: weakref.ref[Tensor], layouts: dict[int, Layout] = _layouts) -> None:  # bound: lives to the exit
        if key in layouts and layouts[key].source is gone:
            del layouts[key]

    values = packed.values.detach().contiguous()
    values = values.view_as(values)  # another object than `packed.values`, which the layout must not keep alive
    near_the_end = offsets[1:] + _READ_AHEAD > values.numel()
    tail_row = int(near_the_end.int().argmax()) if bool(near_the_end.any()) else packed.out_features
    tail = F.pad(values[int(offsets[tail_row]) :], (0, _READ_AHEAD))
    own = PackedSparse(packed.bitmask.contiguous(), values, packed.in_features)
    quads = in_quads(own.bitmask)
    return Layout(version, weakref.ref(packed.values, forget), own, own.density, quads, offsets, tail, tail_row, {}, {})


def _panels(layout: Layout) -> Tensor:
    if "panels" not in layout.made:
        bitmask, values, in_features = layout.packed
        packing = "quads" if layout.quads else "pairs"
        layout.made["panels"] = panels_pack(bitmask, values, layout.offsets, in_features, packing)
    return layout.made["panels"]


def _sparse_linear_cpu(
    x: Tensor, values: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    layout = layout_of(PackedSparse(bitmask, values, in_features))
    if "checked" not in layout.facts or not _fits(x, bitmask, in_features, bias):
        _check(x, values, bitmask, in_features, bias)
        layout.facts["checked"] = True
    sizes = x.shape[:-1].numel(), bitmask.shape[0], in_features
    chosen = route(layout.density, *sizes, _name(values.dtype), quads=layout.quads)
    return run_route(chosen, x, layout, bias)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_route(chosen: str, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """One route of `pykd.ops.sparse_route` on checked arguments."""
    in_features, out_features, rows = layout.packed.in_features, layout.packed.out_features, x.shape[:-1].numel()
    if chosen == "reference" or 0 in (rows, in_features, out_features):
        return sparse_linear_reference(x, layout.packed, bias)
    if chosen == "dense":
        return _run_dense(x, layout, bias)
    y = torch.empty(*x.shape[:-1], out_features)
    run = _run_expand if chosen == "expand" else _run_panels
    run(_float32(x.reshape(rows, in_features)), layout, None if bias is None else _float32(bias), y)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _run_dense(x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    if x.dtype not in layout.made:
        layout.made[x.dtype] = bitmask_expand(layout.packed).to(x.dtype)
    return F.linear(x, layout.made[x.dtype], None if bias is None else bias.to(x.dtype))


def _float32(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype is torch.float32 else tensor.float()).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run_expand(x: Tensor, layout: Layout, bias: Tensor | None, y: Tensor) -> None:
    rows, in_features = x.shape
    x = F.pad(x, (0, -in_features % 16)) if in_features % 16 else x
    bitmask, values, _ = layout.packed
    native.sparse_linear(
        x.data_ptr(), bitmask.data_ptr(), values.data_ptr(), layout.offsets.data_ptr(), layout.tail.data_ptr(),
        _address(bias), y.data_ptr(), rows, in_features, bitmask.shape[0], x.stride(0), layout.tail_row,
        dtype_code(values), num_threads(),
    )  # fmt: skip


def _run_panels(x: Tensor, layout: Layout, bias: Tensor | None, y: Tensor) -> None:
    rows, in_features = x.shape
    pack, threads = _panels(layout), num_threads()
    scratch = torch.empty(native.sparse_panels_scratch(rows, in_features, TILE, threads))
    native.sparse_panels(
        x.data_ptr(), pack.data_ptr(), _address(bias), scratch.data_ptr(), y.data_ptr(), rows, in_features,
        layout.packed.out_features, in_features, threads,
    )  # fmt: skip


# --- CUDA -------------------------------------------------------------------------------------------------------------


def _sparse_linear_cuda(
    x: Tensor, values: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    _check(x, values, bitmask, in_features, bias)
    layout = layout_of(PackedSparse(bitmask, values, in_features))
    rows, out_features = x.shape[:-1].numel(), bitmask.shape[0]
    empty = 0 in (rows, in_features, out_features)
    y = None if empty else run_cuda(x.reshape(rows, in_features).contiguous(), layout, bias)
    return sparse_linear_reference(x, layout.packed, bias) if y is None else y.view(*x.shape[:-1], out_features)


def _sparse_linear_any(
    x: Tensor, values: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    _check(x, values, bitmask, in_features, bias)
    packed = PackedSparse(bitmask, values, in_features)
    check_packed(packed)
    return sparse_linear_reference(x, packed, bias)


_SCHEMA = "sparse_linear(Tensor x, Tensor values, Tensor bitmask, int in_features, Tensor? bias=None) -> Tensor"
lib.define(_SCHEMA)  # type: ignore[no-untyped-call]
torch.library.impl(lib, "sparse_linear", "CPU")(_sparse_linear_cpu)
torch.library.impl(lib, "sparse_linear", "CUDA")(_sparse_linear_cuda)
torch.library.impl(lib, "sparse_linear", "CompositeExplicitAutograd")(_sparse_linear_any)


@torch.library.register_fake("pykd::sparse_linear", lib=lib)  # type: ignore[untyped-decorator]
def _(x: Tensor, values: Tensor, bitmask: Tensor, in_features: int, bias: Tensor | None = None) -> Tensor:
    _check(x, values, bitmask, in_features, bias)
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, values, bitmask, ctx.in_features, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, values, bitmask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, values, bitmask = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = grad @ bitmask_expand(PackedSparse(bitmask, values, ctx.in_features)).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        dense = flat.float().T @ x.reshape(-1, x.shape[-1]).float()
        grad_values = bitmask_gather(dense.to(values.dtype), bitmask, values.shape[0])
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = flat.float().sum(0).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, grad_bias


torch.library.register_autograd("pykd::sparse_linear", _backward, setup_context=_setup, lib=lib)

TABLE.append(Route("sparse_linear", "any", "otherwise", "reference"))
