"""The 4-bit linear layer: int4, uint4, NF4 and FP4 weights, exact in the activation's dtype (w4a16, nf4, fp4), or int4
and uint4 with activations rounded to int8 inside the call (w4a8)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykd.errors import nearest
from pykd.ops import linear_4bit_gpu
from pykd.ops.activation import ACTIVATIONS, activation_gradient, check_activation
from pykd.ops.dispatch import DTYPE_CODES, TABLE, Route, lib, native, num_threads, scratch_for, skips_dispatcher
from pykd.ops.int4_r16 import code_number, codebook, dequantize, groups_of, packed_bytes, unpack_r16
from pykd.ops.linear_4bit_reference import INPUTS, reference

TABLE.extend(
    [
        Route("linear_4bit", "cpu", "int4_r16 layout; float32, bfloat16, float16", "native kernel, any number of rows"),
        Route(
            "linear_4bit",
            "cpu",
            "of these bfloat16 with int4, uint4, or a table of bfloat16 numbers, at level avx512_bf16",
            "native kernel that multiplies bfloat16 and adds up float32",
        ),
        Route("linear_4bit", "cpu", "canonical layout, float64, or no native module", "reference"),
        Route("linear_4bit", "cuda", "1-8 rows", "CUDA kernel, else Triton, else reference"),
        Route(
            "linear_4bit",
            "cuda",
            f"9-{linear_4bit_gpu.TENSOR_CORE_ROWS} rows; 9-{linear_4bit_gpu.FLOAT32_ROWS} for codebooks, float32, and "
            "groups that are no multiple of 32",
            "Triton, else CUDA kernel, else reference",
        ),
        Route(
            "linear_4bit",
            "cuda",
            "more rows",
            "Triton writes the weight in x's dtype for cuBLAS, else CUDA kernel, else reference",
        ),
        Route("linear_4bit", "cuda", "inputs int8", "as for float32, with the rounded inputs"),
        Route("linear_4bit", "cuda", "float64", "reference"),
    ]
)

lib.define(  # type: ignore[no-untyped-call]
    "linear_4bit(Tensor x, Tensor qweight, Tensor? scales, Tensor? zeros, Tensor? bias, str code, "
    "int out_features, int group_size, str inputs='keep', str? activation=None) -> Tensor"
)
lib.define(  # type: ignore[no-untyped-call]
    "dequantize_4bit(Tensor qweight, Tensor? scales, Tensor? zeros, str code, int out_features, int in_features, "
    "int group_size) -> Tensor"
)


def linear_4bit(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None = None,
    *,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    code: str = "int4",
    out_features: int | None = None,
    group_size: int = 32,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    """y = activation(x W^T + bias) over a group-wise 4-bit weight (W4A16, W4A8; NF4: Dettmers et al. 2023, QLoRA).

    int4: W = (q - 8) * scale; uint4: (q - zero) * scale; nf4 and fp4: table[q] * scale, one scale per group of
    `group_size` consecutive inputs of a row. With `inputs="keep"` the weight is dequantized exactly and products are
    summed in float32; the result has x's dtype, whatever that is: nothing is rounded to a smaller type on the way. One
    exception: on an NVIDIA GPU, calls with many rows (`build_info()["table"]`) round the dequantized weight and the
    bias once to x's dtype, as a dense layer of that dtype holds them, and need memory for that weight during the call
    (see `pykd.ops.linear_4bit_gpu.dense`).

    With `inputs="int8"`, y = sum over groups g of (sum over k in g of x_q (q - zero)) * x_scale_g * scale_g, + bias,
    where x_scale_g = absmax / 127 of the group of the row of x, and x_q = x / x_scale_g to the nearest integer, ties to
    even. The sums in the inner brackets are exact in the native kernel, and added up in float32.

    Args:
        x: activations [..., in_features]; float32, bfloat16, float16 (float64 runs the reference). Any strides.
        qweight: canonical codes, uint8 [out_features, ceil(in_features / 2)], with `scales`; or, without `scales`, the
            CPU layout that `pykd.ops.int4_r16.pack_r16` makes, which already holds scales and zero points.
        scales: float16, bfloat16 or float32 [out_features, groups].
        zeros: for `uint4`: uint8 [out_features, ceil(groups / 2)].
        bias: [out_features], floating point.
        code: "int4", "uint4", "nf4", "fp4", or a table of your own, named by `pykd.ops.int4_r16.codebook_code`.
        out_features: needed with the CPU layout only.
        group_size: at least 1; a group longer than the row is the whole row. It need not divide in_features.
        inputs: "keep", or "int8" with "int4" and "uint4": rounded inside the call, with a scale per row and group.
        activation: "gelu", "gelu_tanh", "silu", "relu" or None: applied before the result is rounded to x's dtype, on
            GPUs after.

    Returns [..., out_features]; with int8 inputs, NaN for a row of x that holds NaN or infinity. Differentiable in x
    and bias; the weight is a constant. The gradient to x is that of the dequantized weight (straight through the
    rounding of x). Raises ValueError for unknown names and for shapes or dtypes that do not fit each other.

    >>> from pykd.nn.codecs.four_bit import quantize_4bit
    >>> w = quantize_4bit(torch.eye(4), group_size=4)
    >>> linear_4bit(torch.ones(2, 4), w.qweight, w.scales, group_size=4)
    tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.]])
    """
    out = qweight.shape[0] if out_features is None else out_features
    _check(x, qweight, scales, zeros, bias, code, out, group_size, inputs)
    check_activation(activation)
    call = _cpu if skips_dispatcher(x, bias) else torch.ops.pykd.linear_4bit
    result: Tensor = call(x, qweight, scales, zeros, bias, code, out, group_size, inputs, activation)
    return result


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    out: int,
    group_size: int,
    inputs: str,
) -> None:
    features = x.shape[-1] if x.dim() else 0
    if features < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., in_features >= 1], got {x.dtype} {list(x.shape)}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must have shape [{out}], one per output, got {list(bias.shape)}")
    if scales is None:
        sizes_of = _packed_sizes if torch.compiler.is_compiling() else _remembered_sizes
        sizes = sizes_of(out, features, group_size, code, inputs)
        # Two comparisons: the compiler does not find a symbolic size `in` a tuple.
        if qweight.dim() != 1 or (qweight.shape[0] != sizes[0] and qweight.shape[0] != sizes[1]):
            raise ValueError(
                f"a weight in the CPU layout for {out} x {features}, group_size {group_size}, {code} has {sizes[0]} "
                f"bytes ({sizes[1]} with float32 scales), got {list(qweight.shape)}: pass the sizes that it was "
                "packed with"
            )
        return
    _check_options(group_size, code, inputs)
    groups = groups_of(features, group_size).number
    if qweight.shape != (out, -(-features // 2)) or scales.shape != (out, groups):
        raise ValueError(
            f"x with {features} features and group_size {group_size} needs qweight [{out}, {-(-features // 2)}] "
            f"and scales [{out}, {groups}], got {list(qweight.shape)} and {list(scales.shape)}"
        )
    if scales.dtype not in DTYPE_CODES:
        raise ValueError(f"scales must be float16, bfloat16 or float32, got {scales.dtype}")
    if (zeros is not None) != (code == "uint4") or (zeros is not None and zeros.shape != (out, -(-groups // 2))):
        raise ValueError(f"zeros of shape [{out}, {-(-groups // 2)}] go with code 'uint4' and with no other code")


def _check_options(group_size: int, code: str, inputs: str) -> None:
    code_number(code)
    if inputs not in INPUTS:
        raise ValueError(nearest("way to take inputs", inputs, INPUTS))
    if INPUTS[inputs] and code not in ("int4", "uint4"):
        raise ValueError(f"inputs='int8' needs weights that are whole numbers, int4 or uint4, got {code!r}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")


def _packed_sizes(out_features: int, in_features: int, group_size: int, code: str, inputs: str) -> tuple[int, int]:
    """Bytes of the CPU layout with float16 scales and with float32 scales, of options that were checked."""
    _check_options(group_size, code, inputs)
    narrow, wide = (
        packed_bytes(out_features, in_features, group_size, code=code, wide_scales=wide) for wide in (False, True)
    )
    return narrow, wide


_remembered_sizes = functools.cache(_packed_sizes)  # not for compilers, which warn of caches
_ROWS: int = native.linear_4bit_rows if native is not None else 0  # of which scratch memory is needed at a time


class _Constants(NamedTuple):
    """What every native call with a weight of the same sizes passes on."""

    narrow_bytes: int  # of the layout with float16 scales
    scratch_per_row: int
    table: Tensor | None
    code: int
    rounds: bool


@functools.cache  # one look-up: small calls cost what Python costs
def _constants(out_features: int, in_features: int, group_size: int, code: str, inputs: str) -> _Constants:
    return _Constants(
        _packed_sizes(out_features, in_features, group_size, code, inputs)[0],
        _scratch_per_row(in_features, group_size, inputs),
        codebook(code, torch.device("cpu")),
        code_number(code),
        INPUTS[inputs],
    )


def _scratch_per_row(in_features: int, group_size: int, inputs: str) -> int:
    """float32 elements: see `scratch` of Linear4bitArgs in csrc/ops.h."""
    groups = groups_of(in_features, group_size)
    if not INPUTS[inputs]:
        return groups.padded_k
    fold: int = native.linear_4bit_fold
    folds = (groups.number - 1) * -(-groups.padded // fold) + -(-groups.padded_last // fold)
    return groups.padded_k // 4 + 3 * folds


@torch.library.impl(lib, "linear_4bit", "CPU")
def _cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    out_features: int,
    group_size: int,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    if native is None or scales is not None or x.dtype not in DTYPE_CODES:
        return reference(x, qweight, scales, zeros, bias, code, out_features, group_size, inputs, activation)
    features = x.shape[-1]
    is_matrix = x.dim() == 2
    flat = x if is_matrix and x.stride(1) == 1 else x.reshape(-1, features).contiguous()
    rows = flat.shape[0]
    narrow_bytes, per_row, table, number, rounds = _constants(out_features, features, group_size, code, inputs)
    y = torch.empty(rows, out_features, dtype=x.dtype)
    if bias is not None and (bias.dtype not in DTYPE_CODES or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    scratch = scratch_for(min(rows, _ROWS) * per_row)
    native.linear_4bit(
        flat.data_ptr(),
        flat.stride(0),
        qweight.data_ptr(),
        0 if table is None else table.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        rows,
        features,
        out_features,
        group_size,
        number,
        qweight.numel() != narrow_bytes,
        rounds,
        ACTIVATIONS[activation],
        DTYPE_CODES[x.dtype],
        0 if bias is None else DTYPE_CODES[bias.dtype],
        num_threads(),
    )
    return y if is_matrix else y.view(*x.shape[:-1], out_features)


torch.library.impl(lib, "linear_4bit", "CompositeExplicitAutograd")(reference)
torch.library.impl(lib, "linear_4bit", "CUDA")(linear_4bit_gpu.cuda)


@torch.library.register_fake("pykd::linear_4bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    code: str,
    out_features: int,
    group_size: int,
    inputs: str = "keep",
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(lib, "dequantize_4bit", "CompositeExplicitAutograd")
def dequantize_4bit(
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    code: str,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    """The dense float32 weight of canonical tensors, or (`scales` None) of the CPU layout; also `torch.ops.pykd.*`."""
    if scales is None:
        qweight, scales, zeros = unpack_r16(
            qweight, out_features=out_features, in_features=in_features, group_size=group_size, code=code
        )
    return dequantize(qweight, scales, zeros, code=code, in_features=in_features, group_size=group_size)


@torch.library.register_fake("pykd::dequantize_4bit", lib=lib)  # type: ignore[untyped-decorator]
def _fake_dequantize(
    qweight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    code: str,
    out_features: int,
    in_features: int,
    group_size: int,
) -> Tensor:
    return qweight.new_empty((out_features, in_features), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, zeros, bias, *options, activation = inputs
    ctx.save_for_backward(qweight, scales, zeros, *(() if activation is None else (x, bias)))
    ctx.options, ctx.activation, ctx.in_features = options, activation, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy W with the dequantized weight; db = sum of dy over rows. The weight is frozen.

    With an activation, what it was applied to is computed again.
    """
    dx = db = None
    qweight, scales, zeros, *inputs = ctx.saved_tensors
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if ctx.activation is not None:
        x, bias = inputs
        sums = torch.ops.pykd.linear_4bit(x.to(wide.dtype), qweight, scales, zeros, bias, *ctx.options)
        wide = activation_gradient(wide, sums, ctx.activation)
    if ctx.needs_input_grad[0]:
        code, out_features, group_size, _ = ctx.options
        weight = torch.ops.pykd.dequantize_4bit(qweight, scales, zeros, code, out_features, ctx.in_features, group_size)
        dx = torch.matmul(wide, weight.to(wide.dtype)).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        db = wide.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, db, None, None, None, None, None


torch.library.register_autograd("pykd::linear_4bit", _backward, setup_context=_setup_context, lib=lib)
