"""Plain rounding: the baseline of the methods that choose codes."""

from __future__ import annotations

from torch import Tensor

from pykd.calibration.inputs import Inputs
from pykd.nn.codecs.four_bit import FourBit, quantize_4bit


def rtn(weight: Tensor, inputs: Inputs | None = None, *, code: str, group_size: int) -> FourBit:
    """Round to nearest: every weight to the level next to it, under the scales that `quantize_4bit` finds.

    inputs is not read. Errors as for `quantize_4bit`.

    >>> import torch
    >>> rtn(torch.tensor([[0.5, -1.0]]), code="int4", group_size=2).scales
    tensor([[0.1250]], dtype=torch.float16)
    """
    return quantize_4bit(weight, code=code, group_size=group_size)
