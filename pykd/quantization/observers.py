"""Observers: the range of a layer's activations that static quantization rounds to 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pykd.calibration.inputs import Inputs, Sample
from pykd.errors import nearest
from pykd.nn.linear_8bit import StaticInput

#: Steps between the smallest and the largest int8 code that is used: -127 to 127, on which every kernel agrees.
STEPS = 254
#: Values that the search for the least error rounds, again and again.
SEARCHED = 32768


def minmax(sample: Sample) -> tuple[float, float]:
    """The smallest and the largest activation that calibration has seen: nothing of it is cut off.

    >>> minmax(Sample(torch.tensor([0.5]), low=-1.0, high=3.0))
    (-1.0, 3.0)
    """
    return sample.low, sample.high


def percentile(sample: Sample, *, share: float = 0.9999) -> tuple[float, float]:
    """The range that holds this share of the activations, the rest half and half at its two ends.

    Raises ValueError for a share that is not above 0 and at most 1.

    >>> percentile(Sample(torch.arange(101.0), low=0.0, high=100.0), share=0.9)
    (5.0, 95.0)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share of the activations that are kept lies above 0 and up to 1, got {share}")
    ordered = sample.values.sort().values
    cut = min(int((1 - share) / 2 * len(ordered) + 1e-9), (len(ordered) - 1) // 2)
    return float(ordered[cut]), float(ordered[-1 - cut])


def mse(sample: Sample) -> tuple[float, float]:
    """The range under which rounding makes the least mean squared error, ends beyond it being cut off.

    Either end is searched with the other one fixed: from the whole range on in steps of a fifth, then in smaller ones.

    >>> low, high = mse(Sample(torch.randn(10_000), low=-4.0, high=400.0))
    >>> high < 10
    True
    """
    low, high = min(sample.low, 0.0), max(sample.high, 0.0)
    values = sample.values[:: max(1, len(sample.values) // SEARCHED)]
    for shrinks in ([0.8**k for k in range(25)], [1.2 - 0.05 * k for k in range(9)]):  # coarse, then about the best
        ends = low, high
        low = min((ends[0] * shrink for shrink in shrinks), key=lambda end: _error(values, end, high))
        high = min((ends[1] * shrink for shrink in shrinks), key=lambda end: _error(values, low, end))
    return max(low, min(sample.low, 0.0)), min(high, max(sample.high, 0.0))


#: A sample of activations -> the range that is rounded, what lies beyond being cut off.
Observer = Callable[[Sample], tuple[float, float]]

#: Name -> observer.
OBSERVERS: dict[str, Observer] = {"minmax": minmax, "percentile": percentile, "mse": mse}


def check_observer(observer: object) -> None:
    """Raise ValueError for an unknown observer.

    >>> check_observer("mse")
    """
    if not callable(observer) and observer not in OBSERVERS:
        raise ValueError(nearest("observer", observer, OBSERVERS))


def observed(inputs: Inputs | None, observer: str | Observer) -> StaticInput:
    """How a layer's activations are rounded, by what calibration saw of them."""
    assert inputs is not None and inputs.sample is not None
    return static_rounding(*(observer if callable(observer) else OBSERVERS[observer])(inputs.sample))


def static_rounding(low: float, high: float) -> StaticInput:
    """Scale and zero point of a range, widened so that it holds 0, which then is exact; asymmetric where the range is.

    >>> static_rounding(0.0, 254.0)
    StaticInput(scale=1.0, zero=-127)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / STEPS if high > low else 1.0, dtype=torch.float32))
    scale = max(scale, torch.finfo(torch.float32).tiny)
    return StaticInput(scale, max(-127, min(127, round(-127 - low / scale))))


def _error(values: Tensor, low: float, high: float) -> float:
    if high - low <= 0:
        return float(values.square().mean())
    scale, zero = static_rounding(low, high)
    codes = (values / scale).round().clamp(-127 - zero, 127 - zero)
    return float((codes * scale - values).square().mean())
