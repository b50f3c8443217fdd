"""Wanda: weights by their size times that of the input they multiply, compared within each output."""

from __future__ import annotations

from torch import Tensor, nn

from pykd.calibration import Inputs
from pykd.calibration.hessian import check_hessian
from pykd.pruning.calibrated import prune_layer_by_layer
from pykd.pruning.outcome import Outcome, Request
from pykd.pruning.weights import masks_of


def wanda(weight: Tensor, inputs: Inputs) -> Tensor:
    """Scores ``|w_ij| * ||x_j||`` of every weight (Sun et al. 2023, Wanda, eq. 1); the norm is up to a constant factor.

    Args:
        weight: [out_features, in_features], floating point.
        inputs: statistics with hessian [blocks, in_features, in_features]; out_features is a multiple of blocks.

    Returns:
        float32 scores of the weight's shape, >= 0, to be compared within a row; a larger score matters more.

    Raises:
        ValueError: the Hessian is of another shape.

    >>> import torch
    >>> wanda(torch.tensor([[1.0, -1.0]]), Inputs(torch.tensor([[[4.0, 0.0], [0.0, 9.0]]]), 8))
    tensor([[2., 3.]])
    """
    check_hessian(weight, inputs.hessian)
    norms = inputs.hessian.diagonal(dim1=1, dim2=2).sqrt()
    blocks, columns = norms.shape
    return (weight.detach().float().abs().view(blocks, -1, columns) * norms[:, None]).view(weight.shape)


def prune_wanda(model: nn.Module, request: Request) -> Outcome:
    """Remove the weights with the smallest score of each output, layer after layer behind the pruned ones."""

    def choose(weight: Tensor, inputs: Inputs, name: str) -> tuple[Tensor, Tensor]:
        return weight, masks_of({name: wanda(weight, inputs)}, request, scope=request.scope or "row")[name]

    return prune_layer_by_layer(model, request, request.batches("method='wanda'"), choose)
