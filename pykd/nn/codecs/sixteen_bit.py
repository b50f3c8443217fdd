"""Rounding a weight to bfloat16 or float16."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scheme -> type of the stored weight. bf16 has the range of float32 and 8 bits of precision, fp16 11 up to 65,504.
SCHEMES_16BIT: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def round_16bit(weight: Tensor, scheme: str) -> Tensor:
    """The nearest values in the 16-bit type of the scheme, ties to even; zeros stay exactly zero.

    Raises ValueError for NaN or infinite weights, and for weights too large for float16.

    >>> round_16bit(torch.tensor([1.0, 1.001]), "bf16")
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values: repair or retrain the layer before quantizing it")
    values = weight.detach().to(SCHEMES_16BIT[scheme])
    if not torch.isfinite(values).all():
        largest = float(weight.detach().abs().max())
        raise ValueError(f"a weight of magnitude {largest:g} is too large for scheme {scheme!r}: use 'bf16'")
    return values
