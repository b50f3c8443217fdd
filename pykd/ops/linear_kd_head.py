"""One side of the op `linear_kd`: a linear head with its input, and the gradients of the side that learns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pykd.ops import memory

#: Columns of a chunk's gradient that are converted to float32 at a time for the weight's gradient: 32 KB of a row.
BLOCK = 8192


class Head(NamedTuple):
    """A linear head and its input: hidden (rows, features), weight (classes, features), bias (classes,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def to(self, dtype: torch.dtype | None) -> Head:
        """The head in another type, as autocast would convert it; float64 is left alone."""
        if dtype is None or self.weight.dtype == torch.float64:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias, self.softcap)

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of so many positions."""
        weight = self.weight
        return memory.empty((rows, weight.shape[0]), dtype=weight.dtype, device=weight.device)

    def logits(self, hidden: Tensor, buffer: Tensor, tanh: Tensor | None = None) -> Tensor:
        """hidden @ weight.T + bias, softcap * tanh(. / softcap), into `buffer`; the tanh into `tanh` if given."""
        out = buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.softcap is None:
            return out
        capped = torch.tanh(out.div_(self.softcap), out=out if tanh is None else tanh)
        return torch.mul(capped, self.softcap, out=out)


class Gradients:
    """The gradients by the student's hidden states, weight and bias; the last two add up over chunks in float32."""

    def __init__(self, student: Head, needs: list[bool]) -> None:
        weight = student.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.hidden, self.weight, self.bias = (
            memory.empty(like.shape, dtype=dtype, device=weight.device).zero_() if need else None
            for need, like, dtype in zip(
                needs,
                (student.hidden, weight, weight[:, 0] if student.bias is None else student.bias),
                (student.hidden.dtype, self.dtype, self.dtype),
                strict=True,
            )
        )

    def add(self, chunk: slice | Tensor, slope: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add what the gradient by the chunk's logits, (positions, classes), contributes."""
        if self.hidden is not None:
            self.hidden[chunk] = torch.mm(slope, weight)
        if self.weight is not None:
            _add_product(self.weight, slope, hidden)
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.dtype)


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total += slope.T @ hidden, in the type of `total`; the operands may be narrower."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.t(), hidden)
        return
    # A product rounded to bfloat16 before it is added would lose what the accumulation in float32 is to keep.
    wide = slope.is_cuda and hasattr(torch.ops.aten.mm, "dtype")  # tensor cores with a float32 result, torch >= 2.8
    right = hidden if wide else hidden.to(total.dtype)
    for columns, rows in zip(torch.split(slope, BLOCK, 1), torch.split(total, BLOCK), strict=True):
        if wide:
            rows += torch.ops.aten.mm.dtype(columns.t(), right, total.dtype)
        else:
            rows.addmm_(columns.t().to(total.dtype), right)
