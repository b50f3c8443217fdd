"""Statistics of a layer's inputs against the layer itself: an output is the weight times the rows that were seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pykd.calibration import inputs as module
from pykd.calibration.inputs import Accumulator

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (1, 3), "padding": "same", "dilation": 2, "groups": 3, "padding_mode": "circular"},
    {"kernel_size": 3, "groups": 6, "padding": (0, 2), "padding_mode": "reflect"},
]


def mean_square(outputs: Tensor) -> Tensor:
    """Per output channel of [rows, outputs]."""
    return outputs.double().square().mean(0)


def quadratic(weight: Tensor, hessian: Tensor) -> Tensor:
    rows = weight.detach().double().reshape(len(hessian), -1, hessian.shape[1])
    return ((rows @ hessian.double()) * rows).sum(2).flatten()


@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=str)
def test_the_hessian_of_a_convolution_predicts_its_outputs(kind: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "UNFOLD_BYTES", 3000)  # a few images at a time
    conv = nn.Conv2d(6, 12, bias=False, **kind)
    images = torch.randn(7, 6, 9, 8)
    accumulator = Accumulator(conv)
    accumulator.add(images[:4])
    accumulator.add(images[4:])
    inputs = accumulator.finish()
    with torch.no_grad():
        outputs = conv(images).movedim(1, -1).flatten(0, 2)
    assert inputs.rows == len(outputs) and inputs.hessian.shape[0] == conv.groups
    torch.testing.assert_close(quadratic(conv.weight, inputs.hessian) / 2, mean_square(outputs), rtol=1e-5, atol=1e-6)


def test_linear_layers_leave_out_padding() -> None:
    linear = nn.Linear(5, 4, bias=False)
    x, mask = torch.randn(3, 7, 5), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 2:] = 0
    accumulator = Accumulator(linear)
    accumulator.add(x.to(torch.bfloat16).float(), mask)
    accumulator.add(x[0, 0], mask)  # one row, as pooled outputs are: the mask says nothing about it
    inputs = accumulator.finish()
    seen = torch.cat((x.to(torch.bfloat16).float()[mask.bool()], x[0, :1]))
    assert inputs.rows == len(seen) == 17
    torch.testing.assert_close(inputs.hessian[0], 2 * seen.T @ seen / 17)


def test_no_rows() -> None:
    inputs = Accumulator(nn.Linear(3, 2)).finish()
    assert inputs.rows == 0 and not inputs.hessian.any()
