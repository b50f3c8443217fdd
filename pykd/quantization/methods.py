"""Methods: how the 4-bit codes of a weight matrix are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pykd.errors import nearest
from pykd.nn.codecs.four_bit import FourBit
from pykd.nn.linear_4bit import SCHEMES_4BIT, code_of, is_4bit
from pykd.ops.int4_r16 import CODEBOOK
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


def check_group_size(group_size: object) -> None:
    """Raise ValueError unless this is a number of inputs, or None for all of them.

    >>> check_group_size(64)
    """
    if group_size is None or (isinstance(group_size, int) and not isinstance(group_size, bool) and group_size >= 1):
        return
    raise ValueError(f"group_size is the number of inputs that share a scale, at least 1, got {group_size!r}")


def check_method(scheme: object, method: object, *, symmetric: bool = True) -> None:
    """Raise ValueError for an unknown scheme or method, or ones that do not go together.

    Of several schemes, {pattern: scheme}, one at least must go with the method and with symmetric=False.

    >>> check_method("w4a16", "gptq")
    """
    if isinstance(scheme, Mapping):
        _check_mapping(scheme, method, symmetric=symmetric)
        return
    if not callable(scheme) and scheme not in SCHEMES and not is_4bit(scheme):
        raise ValueError(nearest("scheme", scheme, (*SCHEMES, CODEBOOK)))
    if not callable(method) and method not in METHODS:
        raise ValueError(nearest("method", method, METHODS))
    shown = scheme if isinstance(scheme, str) else "of your own"
    if is_4bit(scheme):
        code_of(shown)
    if method != "rtn" and not is_4bit(scheme):
        raise ValueError(
            f"method {method!r} chooses 4-bit codes, and scheme {shown!r} has none: use method='rtn', or scheme "
            f"{', '.join(SCHEMES_4BIT)}"
        )
    if not symmetric and SCHEMES_4BIT.get(shown) != "int4":
        raise ValueError(f"symmetric=False stores zero points of schemes 'w4a16' and 'w4a8', got scheme {shown!r}")


def _check_mapping(schemes: Mapping[object, object], method: object, *, symmetric: bool) -> None:
    if not schemes:
        raise ValueError("scheme names no layer: write {pattern of layer names: scheme}")
    for pattern, scheme in schemes.items():
        if not isinstance(pattern, str) or not isinstance(scheme, str):
            raise ValueError(f"several schemes are {{pattern of layer names: scheme}}, got {{{pattern!r}: {scheme!r}}}")
        check_method(scheme, "rtn")
    fitting = next((s for s in schemes.values() if is_4bit(s)), next(iter(schemes.values())))
    if not symmetric:
        fitting = next((s for s in schemes.values() if SCHEMES_4BIT.get(str(s)) == "int4"), fitting)
    check_method(fitting, method, symmetric=symmetric)
