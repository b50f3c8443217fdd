"""The 8-bit linear layer: int8 weights per output, activations rounded inside the call (w8a8) or kept (w8a16)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.errors import nearest
from pykd.ops.activation import ACTIVATIONS, activate, activation_gradient, check_activation
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, lib, native, num_threads, scratch_for, skips_dispatcher
from pykd.ops.int8_r16 import packed_bytes, unpack_r16

TABLE.extend(
    [
        Route("linear_8bit", "cpu", "int8_r16 layout; float32, bfloat16, float16", "native kernel, any number of rows"),
        Route("linear_8bit", "cpu", "canonical layout, float64, or no native module", "reference"),
        Route("linear_8bit", "cuda", "w8a8", "torch._int_mm, rows and sizes padded as it needs"),
        Route("linear_8bit", "cuda", "w8a16", "reference"),
        Route("linear_8bit", "other", "always", "reference"),
        Route(
            "Linear8bit", "all", "w8a16 with a scale per group of inputs", "dense weight unpacked in each call, torch"
        ),
    ]
)

#: Scheme -> whether activations are rounded to int8, a scale per row.
SCHEMES_8BIT: dict[str, bool] = {"w8a8": True, "w8a16": False}

#: The native kernel takes so many inputs: beyond, sums of products of codes need not fit in 32 bits.
MOST_FEATURES: int = native.linear_8bit_features if native is not None else 0

lib.define(  # type: ignore[no-untyped-call]
    "linear_8bit(Tensor x, Tensor qweight, Tensor? scales, Tensor? bias, str scheme, int out_features, "
    "str? activation=None, float? input_scale=None, int input_zero=0) -> Tensor"
)
lib.define(  # type: ignore[no-untyped-call]
    "dequantize_8bit(Tensor qweight, Tensor? scales, int out_features, int in_features) -> Tensor"
)


def quantize_rows(x: Tensor, input_scale: float | None = None, input_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Quantization of activations [rows, in_features]: int8 codes in -127..127 and float32 scales [rows, 1].

    Dynamic, by each row's largest magnitude / 127; or, with `input_scale`, x = input_scale * (code - input_zero). A row
    that holds NaN or infinity gets a NaN scale, so that its result is NaN and not a plausible number.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True)
    finite = torch.isfinite(largest)
    scales = largest / 127 if input_scale is None else torch.full_like(largest, input_scale)
    safe = torch.where(scales > 0, scales, 1.0)
    codes = (wide / safe).nan_to_num().round().clamp(-127 - input_zero, 127 - input_zero) + input_zero
    return codes.to(torch.int8), torch.where(finite, scales, torch.nan)


def linear_8bit_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    scheme: str,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    """activation(((x_q - zero) W_q^T) * x_scale * scale + bias) over the rows of x, the integers multiplied as float32.

    w8a16: activation(x (W_q * scale)^T + bias) in float32 (float64 for float64 x); the result in x's dtype.
    """
    if SCHEMES_8BIT[scheme]:
        codes, row_scales = quantize_rows(x, input_scale, input_zero)
        return _finish(F.linear(codes.float() - input_zero, qweight.float()), row_scales, scales, bias, activation).to(
            x.dtype
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize_8bit(qweight, scales, *qweight.shape).to(wide)
    y = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return activate(y, activation).to(x.dtype)


def linear_8bit(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scheme: str = "w8a8",
    out_features: int | None = None,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    """y = activation(x W^T + bias) with W = q * scale, int8 q and a scale per output (W8A8, dynamic, per token; W8A16).

    w8a8: y = (sum_k x_q q) * x_scale * scale + bias, with x_scale = absmax / 127 of the row of x and x_q = x / x_scale,
    to the nearest integer, ties to even. The native kernel's sums are exact; the reference's to what float32 holds.
    With an input_scale (static, the same for all) x_q = round(x / input_scale) + input_zero within -127..127, and
    y = (sum_k (x_q - input_zero) q) * input_scale * scale + bias.
    w8a16: y = (sum_k x q) * scale + bias in float32; nothing is rounded to a smaller type on the way.

    Args:
        x: activations [..., in_features]; float32, bfloat16, float16 (float64 runs the reference). Any strides.
        qweight: int8 [out_features, in_features], with `scales`; or, without `scales`, the CPU layout that
            `pykd.ops.int8_r16.pack_r16` makes, which already holds them, for in_features up to 131,072.
        scales: float32 [out_features].
        bias: [out_features], floating point.
        scheme: "w8a8" or "w8a16".
        out_features: needed with the CPU layout only.
        activation: "gelu", "gelu_tanh", "silu", "relu" or None: applied before the result is rounded to x's dtype.
        input_scale: w8a8 only: the scale of every activation, above 0 and exact in float32, instead of one per row.
        input_zero: with input_scale: the code of 0, -127 to 127.

    Returns [..., out_features] in x's dtype; for w8a8, NaN for a row of x that holds NaN or infinity. Differentiable in
    x and bias: the gradient to x is the one of the dequantized weight (straight through the rounding of x). Raises
    ValueError for an unknown scheme, for shapes or dtypes that do not fit, and for a scale or zero point out of range.

    >>> from pykd.nn.codecs.eight_bit import quantize_8bit
    >>> linear_8bit(torch.ones(1, 2), *quantize_8bit(torch.eye(2)))
    tensor([[1., 1.]])
    """
    out = qweight.shape[0] if out_features is None else out_features
    _check(x, qweight, scales, bias, scheme, out)
    check_activation(activation)
    if input_scale is not None or input_zero:
        check_static(scheme, input_scale, input_zero)
    call = _cpu if skips_dispatcher(x, bias) else torch.ops.pykd.linear_8bit
    result: Tensor = call(x, qweight, scales, bias, scheme, out, activation, input_scale, input_zero)
    return result


def check_static(scheme: str, input_scale: float | None, input_zero: int) -> None:
    """Raise ValueError for a scale or zero point of activations that is out of range or without use."""
    if not SCHEMES_8BIT[scheme] or input_scale is None:
        raise ValueError(
            f"input_scale, and input_zero beside it, go with scheme 'w8a8', got scheme {scheme!r}, input_scale "
            f"{input_scale} and input_zero {input_zero}"
        )
    if not 0 < input_scale < float("inf") or not -127 <= input_zero <= 127:
        raise ValueError(
            f"input_scale is above 0 and finite, input_zero from -127 to 127, got {input_scale} and {input_zero}"
        )


def _check(x: Tensor, qweight: Tensor, scales: Tensor | None, bias: Tensor | None, scheme: str, out: int) -> None:
    if scheme not in SCHEMES_8BIT:
        raise ValueError(nearest("8-bit scheme", scheme, SCHEMES_8BIT))
    if x.dim() < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., in_features >= 1], got {x.dtype} {list(x.shape)}")
    features = x.shape[-1]
    if qweight.device != x.device:
        raise ValueError(f"x is on {x.device} and qweight on {qweight.device}: move them to one device")
    if scales is None:
        size = packed_bytes(out, features)
        if qweight.shape != (size,) or qweight.dtype != torch.uint8:
            raise ValueError(
                f"a weight in the CPU layout for {out} x {features} is uint8 [{size}], got {qweight.dtype} "
                f"{list(qweight.shape)}: pass the sizes that it was packed with, or scales with a canonical weight"
            )
        if features > MOST_FEATURES > 0:
            raise ValueError(
                f"the CPU layout is for at most {MOST_FEATURES} inputs, whose sums fit in 32 bits, got {features}: "
                f"pass the canonical qweight and scales"
            )
    elif qweight.dtype != torch.int8 or qweight.shape != (out, features):
        raise ValueError(
            f"qweight must be int8 [out_features, {features}] to fit x, got {qweight.dtype} {list(qweight.shape)}"
        )
    if (scales is not None and scales.shape != (out,)) or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"scales and bias must have shape [{out}], one per output")


def _finish(sums: Tensor, row_scales: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = sums.float() * row_scales * scales
    return activate(y if bias is None else y + bias.float(), activation)


@torch.library.impl(lib, "linear_8bit", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_features: int,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    if scales is None:
        qweight, scales = unpack_r16(qweight, out_features=out_features, in_features=x.shape[-1])
    y = linear_8bit_reference(
        x.reshape(-1, x.shape[-1]), qweight, scales, bias, scheme, activation, input_scale, input_zero
    )
    return y.view(*x.shape[:-1], out_features)


@torch.library.impl(lib, "linear_8bit", "CPU")
def _cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_features: int,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    if native is None or scales is not None or x.dtype not in DTYPE_CODES:
        return _reference(x, qweight, scales, bias, scheme, out_features, activation, input_scale, input_zero)
    features = x.shape[-1]
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, features).contiguous()
    packed, rows, rounds = qweight.contiguous(), flat.shape[0], SCHEMES_8BIT[scheme]
    y = torch.empty(rows, out_features, dtype=x.dtype)
    if bias is not None and (bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    quads = -(-features // 4)
    scratch = scratch_for(min(rows, native.linear_8bit_rows) * (1 + quads if rounds else 4 * quads))
    native.linear_8bit(
        flat.data_ptr(),
        flat.stride(0),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        rows,
        features,
        out_features,
        rounds,
        ACTIVATIONS[activation],
        DTYPE_CODES[x.dtype],
        0 if bias is None else DTYPE_CODES[bias.dtype],
        num_threads(),
        input_scale or 0.0,
        input_zero,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


@torch.library.impl(lib, "linear_8bit", "CUDA")
def _cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_features: int,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    if scales is None or not SCHEMES_8BIT[scheme]:
        return _reference(x, qweight, scales, bias, scheme, out_features, activation, input_scale, input_zero)
    codes, row_scales = quantize_rows(x.reshape(-1, x.shape[-1]), input_scale, input_zero)
    sums = _int_mm(codes, qweight).float()
    if input_zero:
        sums -= input_zero * qweight.sum(1, dtype=torch.int32)
    y = _finish(sums, row_scales, scales, bias, activation).to(x.dtype)
    return y.view(*x.shape[:-1], out_features)


def _int_mm(codes: Tensor, qweight: Tensor) -> Tensor:
    """int32 [rows, out]. CUDA needs more than 16 rows and sizes that are multiples of 8."""
    rows, out = codes.shape[0], qweight.shape[0]
    fill = -codes.shape[1] % 8
    codes = F.pad(codes, (0, fill, 0, max(0, 17 - rows)))
    qweight = F.pad(qweight, (0, fill, 0, -out % 8))
    result: Tensor = torch._int_mm(codes, qweight.t())
    return result[:rows, :out]


@torch.library.register_fake("pykd::linear_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    out_features: int,
    activation: str | None = None,
    input_scale: float | None = None,
    input_zero: int = 0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(lib, "dequantize_8bit", "CompositeExplicitAutograd")
def dequantize_8bit(qweight: Tensor, scales: Tensor | None, out_features: int, in_features: int) -> Tensor:
    """The dense float32 weight of codes and scales, or (`scales` None) of the CPU layout; also `torch.ops.pykd.*`."""
    if scales is None:
        qweight, scales = unpack_r16(qweight, out_features=out_features, in_features=in_features)
    return qweight.float() * scales.unsqueeze(1)


@torch.library.register_fake("pykd::dequantize_8bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake_dequantize(qweight: Tensor, scales: Tensor | None, out_features: int, in_features: int) -> Tensor:
    return qweight.new_empty((out_features, in_features), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, bias, scheme, out_features, activation, *static = inputs
    ctx.save_for_backward(qweight, scales, *(() if activation is None else (x, bias)))
    ctx.options, ctx.activation, ctx.in_features = (scheme, out_features), activation, x.shape[-1]
    ctx.static = static
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy W with the dequantized weight; db = sum of dy over rows. The weight is frozen.

    With an activation, what it was applied to is computed again.
    """
    dx = db = None
    qweight, scales, *inputs = ctx.saved_tensors
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if ctx.activation is not None:
        x, bias = inputs
        sums = torch.ops.pykd.linear_8bit(x.to(wide.dtype), qweight, scales, bias, *ctx.options, None, *ctx.static)
        wide = activation_gradient(wide, sums, ctx.activation)
    if ctx.needs_input_grad[0]:
        weight = torch.ops.pykd.dequantize_8bit(qweight, scales, ctx.options[1], ctx.in_features)
        dx = torch.matmul(wide, weight.to(wide.dtype)).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        db = wide.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return dx, None, None, db, None, None, None, None, None


torch.library.register_autograd("pykd::linear_8bit", _backward, setup_context=_setup_context, lib=lib)
