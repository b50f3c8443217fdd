from __future__ import annotations

import pytest
import torch

from pykd.nn.importance import magnitude, masks_at_sparsity


def test_magnitude() -> None:
    weight = torch.tensor([[-2.0, 0.5], [0.0, -0.25]], dtype=torch.bfloat16, requires_grad=True)
    scores = magnitude(weight)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == [[2.0, 0.5], [0.0, 0.25]]


@pytest.mark.parametrize("sparsity", [0.0, 0.15, 0.5, 0.9, 1.0])
def test_exactly_the_asked_share_is_pruned_globally(sparsity: float) -> None:
    scores = {"a": torch.rand(7, 11), "b": torch.rand(40) * 0.1, "c": torch.ones(3, 3, 2)}
    masks = masks_at_sparsity(scores, sparsity)
    total = sum(score.numel() for score in scores.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    assert {name: mask.shape for name, mask in masks.items()} == {name: score.shape for name, score in scores.items()}
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    cut = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    if kept.numel() and cut.numel():
        assert kept.min() >= cut.max()


def test_ties_are_cut_in_order() -> None:
    masks = masks_at_sparsity({"a": torch.ones(3), "b": torch.ones(3)}, 0.5)
    assert masks["a"].tolist() == [False] * 3 and masks["b"].tolist() == [True] * 3


def test_errors() -> None:
    with pytest.raises(ValueError, match="1 of 3 weights are NaN or infinite"):
        magnitude(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ValueError, match=r"between 0 and 1; got 1.5"):
        masks_at_sparsity({"a": torch.ones(3)}, 1.5)
    with pytest.raises(ValueError, match="no weights to rank"):
        masks_at_sparsity({}, 0.5)
