"""Methods: how the 4-bit codes of a weight matrix are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pykd.errors import nearest
from pykd.nn.codecs.four_bit import FourBit
from pykd.nn.linear_4bit import SCHEMES_4BIT
from pykd.quantization.awq import awq
from pykd.quantization.gptq import gptq
from pykd.quantization.hqq import hqq
from pykd.quantization.rtn import rtn
from pykd.quantization.schemes import SCHEMES

#: (weight [out_features, in_features], `Inputs` or None, *, code, group_size) -> canonical tensors, as `rtn`.
Choose = Callable[..., FourBit]


class Method(NamedTuple):
    """A function that chooses codes, and whether it reads statistics of the layer's inputs."""

    choose: Choose
    calibrated: bool


#: Name -> method.
METHODS: dict[str, Method] = {
    "rtn": Method(rtn, calibrated=False),
    "hqq": Method(hqq, calibrated=False),
    "gptq": Method(gptq, calibrated=True),
    "awq": Method(awq, calibrated=True),
}


def check_method(scheme: object, method: object, *, symmetric: bool = True) -> None:
    """Raise ValueError for an unknown scheme or method, or ones that do not go together.

    >>> check_method("w4a16", "gptq")
    """
    if not callable(scheme) and scheme not in SCHEMES:
        raise ValueError(nearest("scheme", scheme, SCHEMES))
    if not callable(method) and method not in METHODS:
        raise ValueError(nearest("method", method, METHODS))
    shown = scheme if isinstance(scheme, str) else "of your own"
    if method != "rtn" and scheme not in SCHEMES_4BIT:
        raise ValueError(
            f"method {method!r} chooses 4-bit codes, and scheme {shown!r} has none: use method='rtn', or scheme "
            f"{', '.join(SCHEMES_4BIT)}"
        )
    if not symmetric and SCHEMES_4BIT.get(shown) != "int4":
        raise ValueError(f"symmetric=False stores zero points of schemes 'w4a16' and 'w4a8', got scheme {shown!r}")
