"""From scheme, method and options to one function per layer, and what calibration must collect for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from pykd.calibration import Inputs
from pykd.nn import CompressedModule
from pykd.nn.codecs.sixteen_bit import SCHEMES_16BIT
from pykd.nn.linear_4bit import SCHEMES_4BIT, code_of, is_4bit
from pykd.nn.linear_8bit import STATIC
from pykd.nn.selection import as_linear, matches
from pykd.quantization.methods import METHODS, Choose, Method
from pykd.quantization.observers import Observer, observed
from pykd.quantization.schemes import Scheme, eight_bit, four_bit, sixteen_bit

#: (dense layer, statistics of its inputs) -> packed layer.
Pack = Callable[[nn.Module, Inputs | None], CompressedModule]
#: One scheme for all layers, or {pattern of names: scheme}, of which the first that fits counts.
Schemes = str | Scheme | Mapping[str, str]


class Packer(NamedTuple):
    """A function that packs a layer, and which statistics of its inputs it reads."""

    pack: Pack
    hessian: bool
    sample: bool


class Options(NamedTuple):
    """What `quantize` was told, besides the schemes."""

    method: str | Choose
    group_size: int | None
    symmetric: bool
    observer: str | Observer
    has_data: bool

    def chosen(self) -> Method:
        """The method, calibrated or not."""
        return Method(self.method, self.has_data) if callable(self.method) else METHODS[self.method]


def packer(scheme: str | Scheme, options: Options) -> Packer:
    """One function from a dense layer to a packed one."""
    if isinstance(scheme, str) and is_4bit(scheme):
        chosen = options.chosen()
        return Packer(_four_bit(scheme, chosen.choose, options), chosen.calibrated, False)
    if scheme == STATIC:
        return Packer(lambda layer, inputs: eight_bit(layer, STATIC, observed(inputs, options.observer)), False, True)
    if isinstance(scheme, str):
        make = sixteen_bit if scheme in SCHEMES_16BIT else eight_bit
        return Packer(lambda layer, inputs: make(layer, scheme), False, False)
    return Packer(lambda layer, inputs: scheme(layer, size_of(layer, options.group_size)), False, False)


def packers(schemes: Schemes, names: Sequence[str], options: Options) -> dict[str, Packer]:
    """The packer of each layer that a scheme is for."""
    if not isinstance(schemes, Mapping):
        return dict.fromkeys(names, packer(schemes, options))
    made = {scheme: packer(scheme, options) for scheme in set(schemes.values())}
    found = {name: first(schemes, name) for name in names}
    return {name: made[scheme] for name, scheme in found.items() if scheme is not None}


def schemes_of(schemes: Schemes) -> list[object]:
    """All schemes that are named."""
    return list(schemes.values()) if isinstance(schemes, Mapping) else [schemes]


def uses_static(schemes: Schemes) -> bool:
    """Whether activations are rounded under scales that calibration chooses."""
    return STATIC in schemes_of(schemes)


def first(schemes: Mapping[str, str], name: str) -> str | None:
    """The scheme of the first pattern that fits a name; None where none does.

    >>> first({"encoder.0": "w8a8", "encoder*": "w4a16"}, "encoder.1.query")
    'w4a16'
    """
    return next((scheme for pattern, scheme in schemes.items() if matches(name, pattern)), None)


def size_of(layer: nn.Module, group_size: int | None) -> int:
    """None is the whole row of the weight matrix."""
    return cast(Tensor, layer.weight)[0].numel() if group_size is None else group_size


def as_dense(layer: nn.Module) -> Any:
    """The ordinary linear layer or convolution that a layer computes like."""
    return layer.to_dense() if isinstance(layer, CompressedModule) else as_linear(layer)


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors in a saved file."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def _four_bit(scheme: str, choose: Choose, options: Options) -> Pack:
    symmetric = options.symmetric or SCHEMES_4BIT.get(scheme) != "int4"
    code = code_of(scheme, symmetric=symmetric)

    def pack(layer: nn.Module, inputs: Inputs | None) -> CompressedModule:
        matrix, size = cast(Tensor, layer.weight).detach().flatten(1), size_of(layer, options.group_size)
        tensors: Any = choose(matrix, inputs, code=code, group_size=size)
        return four_bit(layer, tensors, scheme=scheme, group_size=size, symmetric=symmetric)

    return pack
