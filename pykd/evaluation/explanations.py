"""Whether two classifiers look at the same things: attributions of their inputs, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pykd.data.bundle import DataBundle
from pykd.errors import DataError
from pykd.evaluation.latency import device_of, evaluating
from pykd.models.adapter import logits, move, unwrap


@dataclass(frozen=True)
class Explanations:
    """How alike the attributions of two models are, means over ``examples``: 1 the same, 0 unrelated, -1 opposite.

    cosine: of the attributions as vectors over tokens or pixels. rank_correlation: Spearman's. skipped: examples with
    constant attributions, which have neither. cosines, rank_correlations: of each example that counts, in order.
    """

    cosine: float
    rank_correlation: float
    examples: int
    skipped: int
    steps: int
    cosines: tuple[float, ...]
    rank_correlations: tuple[float, ...]

    def sentence(self) -> str:
        """The result in words."""
        return (
            f"integrated gradients of {self.examples} examples: cosine {self.cosine:.3f}, "
            f"rank correlation {self.rank_correlation:.3f}"
        )


def explanation_similarity(
    model: nn.Module, baseline: nn.Module, data: DataBundle, *, examples: int = 16, steps: int = 32
) -> Explanations:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1; captum) of two classifiers on the same test examples.

    Both explain the class that ``baseline`` predicts. Texts: an attribution a token, the sum over its embedding, from
    padding tokens (special tokens stay). Images: one a pixel, the sum over channels, from black in the data's scale.
    examples: the first of the test split; steps: of the integral, at least 1. Models may be compressed.

    Raises DataError for data that is not for classification, without captum, and when no example has attributions that
    differ between its tokens or pixels; ValueError for numbers below 1.
    """
    if examples < 1 or steps < 1:
        raise ValueError(f"examples and steps must be at least 1, got {examples} and {steps}")
    if data.task != "classification":
        raise DataError(f"explanations are compared for classifiers; {data.name!r} is for {data.task}")
    from scipy import stats

    cosines, ranks, skipped = [], [], 0
    for index in range(min(examples, len(data.test))):
        batch = data.collate([data.test[index]])
        with evaluating(baseline):
            target = int(logits(baseline, move(batch, device_of(baseline))).argmax(-1))
        now, before = (attributions(each, batch, target, data, steps=steps) for each in (model, baseline))
        if len(now) < 2 or now.std() == 0 or before.std() == 0:
            skipped += 1
            continue
        cosines.append(float(torch.cosine_similarity(now, before, dim=0)))
        ranks.append(float(stats.spearmanr(now.numpy(), before.numpy()).statistic))
    if not cosines:
        raise DataError(f"none of {skipped} examples of {data.name!r} has attributions that differ; give longer inputs")
    cosine, rank = (math.fsum(values) / len(values) for values in (cosines, ranks))
    return Explanations(cosine, rank, len(cosines), skipped, steps, tuple(cosines), tuple(ranks))


def attributions(model: nn.Module, batch: Mapping[str, Any], target: int, data: DataBundle, *, steps: int) -> Tensor:
    """What each token or pixel of one example adds to the logit of class ``target``: float64 on the CPU, (places,).

    The sum is the logit's difference to that of the neutral input, up to the error of ``steps``.
    """
    attr = _captum()
    device = device_of(model)
    given = {name: tensor for name, tensor in move(batch, device).items() if isinstance(tensor, Tensor)}
    key = "input_ids" if "input_ids" in given else "pixel_values"

    def score(values: Tensor) -> Tensor:
        same = {name: tensor.expand(len(values), *tensor.shape[1:]) for name, tensor in given.items()}
        return logits(model, {**same, key: values})

    options: dict[str, Any] = {"target": target, "n_steps": steps, "internal_batch_size": 16}
    with evaluating(model), torch.enable_grad():
        if key == "input_ids":
            inner: Any = unwrap(model)
            found = attr.LayerIntegratedGradients(score, inner.get_input_embeddings()).attribute(
                given[key], baselines=_neutral(given[key], data.tokenizer), **options
            )
            places = found.sum(-1)
        else:
            pixels = given[key].clone().requires_grad_()
            places = attr.IntegratedGradients(score).attribute(pixels, torch.zeros_like(pixels), **options).sum(1)
    flat: Tensor = places.detach().flatten().double().cpu()
    return flat


def _neutral(ids: Tensor, tokenizer: Any) -> Tensor:
    """The text with padding for every token but the special ones."""
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    special = torch.tensor(getattr(tokenizer, "all_special_ids", []) or [padding], device=ids.device)
    return torch.where(torch.isin(ids, special), ids, torch.full_like(ids, padding))


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError:
        raise DataError("explanations need captum: install it with `pip install 'pykd[explain]'`") from None
    return captum.attr
