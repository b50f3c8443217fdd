"""Attention of encoders: every token of a text looks at all tokens of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pykd.ops.dispatch import TABLE, Route, native, num_threads, skips_dispatcher

TABLE.extend(
    [
        Route("attention", "cpu", "float32, no gradient wanted, not compiled", "native kernel, any length"),
        Route("attention", "all", "otherwise", "torch.nn.functional.scaled_dot_product_attention"),
    ]
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """y = softmax(scale q k^T + bias) v for each head (Vaswani et al. 2017, eq. 1), as an encoder's layers have them.

    Args:
        q, k, v: [batch, length, heads * dim], floating point: the heads of a token lie beside each other, so that
            nothing is transposed on the way in or out.
        heads: how many.
        scale: of the products; None is 1 / sqrt(dim).
        bias: [batch, length], added to all scores of a key: 0 where a token may be looked at and -inf where it is
            padding. None lets all be looked at. A text of padding alone has zeros on the CPU.

    Returns [batch, length, heads * dim] in q's dtype. Differentiable. Raises ValueError for shapes that do not fit.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> attention(x, x, x, heads=1, bias=torch.tensor([[0.0, -torch.inf]]))
    tensor([[[1., 0.],
             [1., 0.]]])
    """
    _check(q, k, v, heads, bias)
    batch, length, width = q.shape
    scale = (width // heads) ** -0.5 if scale is None else scale
    if _runs_natively(q, k, v, bias):
        return _native(q, k, v, heads, scale, bias)
    query, key, value = (part.reshape(batch, length, heads, width // heads).transpose(1, 2) for part in (q, k, v))
    mask = None if bias is None else bias[:, None, None, :].to(q.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).reshape(batch, length, width)


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
        raise ValueError(f"q, k and v must be [batch, length, heads * dim], all alike; got {shapes}")
    if heads < 1 or q.shape[2] % heads:
        raise ValueError(f"{heads} heads do not divide the {q.shape[2]} features of a token")
    if bias is not None and bias.shape != q.shape[:2]:
        raise ValueError(f"bias must be (batch, length) = {tuple(q.shape[:2])}, got {tuple(bias.shape)}")


def _runs_natively(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    if native is None or not q.numel():
        return False
    plain = all(x.dtype == torch.float32 and skips_dispatcher(x, None) for x in (q, k, v))
    return plain and (bias is None or skips_dispatcher(bias, None))


def _native(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, bias: Tensor | None) -> Tensor:
    batch, length, width = q.shape
    q, k, v = (x if _is_rows(x) else x.contiguous() for x in (q, k, v))
    bias = None if bias is None else bias.float().contiguous()
    dim, threads = width // heads, num_threads()
    y = torch.empty(batch, length, width)
    scratch = torch.empty(threads * native.attention_scratch(length, dim))
    native.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(1), k.stride(1), v.stride(1),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), scratch.data_ptr(), batch, length, heads, dim, scale,
        threads,
    )  # fmt: skip
    return y


def _is_rows(x: Tensor) -> bool:
    """Whether the tokens are rows that follow each other at one distance."""
    batches, rows, columns = x.stride()
    return columns == 1 and (x.shape[0] == 1 or batches == x.shape[1] * rows)
