"""What calibration measures of a layer's inputs, added up call by call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Bytes that the unfolded inputs of a convolution may take at once.
UNFOLD_BYTES = 64 << 20
#: Values of each call's input that a sample keeps.
SAMPLED = 16384


class Sample(NamedTuple):
    """Single activations of a layer: `values` float32 [n], some of every call; `low`, `high`: the extremes of all."""

    values: Tensor
    low: float
    high: float


class Inputs(NamedTuple):
    """Statistics of the rows x that a layer multiplied its weight matrix [out_features, in_features] with.

    hessian: float32 [blocks, in_features, in_features], 2 / rows * sum of x x^T: the second derivative of an output's
    mean squared error by the weights that make it (Frantar et al. 2022, GPTQ). blocks: 1, or the groups of a
    convolution: the outputs fall into that many equal runs, each with inputs of its own. rows: how many were seen.
    sample: single activations, where they were asked for.
    """

    hessian: Tensor
    rows: int
    sample: Sample | None = None


class Accumulator:
    """Adds up `Inputs` of one layer, nn.Linear or nn.Conv2d, batch by batch; memory does not grow with the rows.

    >>> accumulator = Accumulator(nn.Linear(2, 3))
    >>> accumulator.add(torch.tensor([[1.0, -2.0]]))
    >>> accumulator.finish()
    Inputs(hessian=tensor([[[ 2., -4.],
             [-4.,  8.]]]), rows=1, sample=None)
    """

    def __init__(self, layer: nn.Module, *, hessian: bool = True, sample: bool = False) -> None:
        """hessian, sample: which of the two to collect; without `hessian` it is empty, and rows are 0."""
        self.layer, self.rows = layer, 0
        weight: Any = layer.weight
        blocks = layer.groups if isinstance(layer, nn.Conv2d) else 1
        columns = weight[0].numel()
        self.products = torch.zeros(blocks, columns, columns, device=weight.device) if hessian else None
        self.values: list[Tensor] | None = [] if sample else None
        self.extremes: list[Tensor] = []

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """One call's input; mask [batch, positions] leaves out the padding where the input has these dimensions."""
        conv = isinstance(self.layer, nn.Conv2d)
        if self.values is not None:
            self._add_sample((x if conv else unpadded_rows(x, mask)).float().flatten())
        if self.products is None:
            return
        pieces = _unfolded(self.layer, x) if isinstance(self.layer, nn.Conv2d) else iter([unpadded_rows(x, mask)])
        for piece in pieces:  # [blocks, rows, columns]
            self.products.baddbmm_(piece.transpose(1, 2), piece)
            self.rows += piece.shape[1]

    def finish(self) -> Inputs:
        """The mean; the sum is given up."""
        sample = None
        if self.values is not None:
            low, high = torch.stack(self.extremes).aminmax() if self.extremes else (torch.zeros(()), torch.zeros(()))
            sample = Sample(torch.cat([*self.values, torch.zeros(1)]), float(low), float(high))
        if self.products is None:
            return Inputs(torch.zeros(0, 0, 0), 0, sample)
        return Inputs(self.products.mul_(2 / max(self.rows, 1)), self.rows, sample)

    def _add_sample(self, flat: Tensor) -> None:
        """Values at multiples of the golden ratio, which fall evenly and on no single column."""
        assert self.values is not None
        if flat.numel():
            self.extremes += torch.aminmax(flat)
            if len(flat) > SAMPLED:
                places = (torch.arange(SAMPLED, dtype=torch.float64) * 0.6180339887498949 % 1 * len(flat)).long()
                flat = flat[places.to(flat.device)]
            self.values.append(flat.cpu())


def unpadded_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [1, rows, features] of a linear layer's input, without those that a mask of positions calls padding."""
    fits = mask is not None and x.dim() > mask.dim() and x.shape[: mask.dim()] == mask.shape
    rows = x[mask.bool()] if fits and mask is not None else x
    return rows.reshape(1, -1, x.shape[-1]).float()


def _unfolded(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """The patches under the kernel, [groups, positions, in_channels / groups * kh * kw], a few images at a time."""
    x = (x if x.dim() == 4 else x[None]).float()
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    size = kernel[0] * kernel[1] * x[0].nbytes // (stride[0] * stride[1])
    for images in torch.split(x, max(1, UNFOLD_BYTES // max(1, size))):
        patches = F.unfold(images, kernel, dilation=dilation, stride=stride)
        patches = patches.view(len(images), conv.groups, -1, patches.shape[2])
        yield patches.permute(1, 0, 3, 2).flatten(1, 2)
