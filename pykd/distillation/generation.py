"""Sequences that a model writes itself, as batches to train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import DataError
from pykd.models.adapter import unwrap
from pykd.training.labels import IGNORED, predicts_next
from pykd.training.source import Batch


@torch.no_grad()
def written(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Batch:
    """The batch with targets that ``model`` generates, as long as the batch's own at most; options go to ``generate``.

    Encoder-decoders answer ``input_ids``: the labels are replaced. Causal models continue the first half of the
    shortest row: ``input_ids``, ``attention_mask`` and ``labels`` are replaced, and the given half has label -100.
    Nothing after the first end-of-sequence token counts. Raises DataError for other models.
    """
    inner: Any = unwrap(model)
    config = getattr(inner, "config", None)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    if not decodes and not predicts_next(inner):
        raise DataError(f"{type(inner).__name__} does not generate: use a sequence-to-sequence or a causal model")
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    shortest = ids.shape[1] if mask is None else int(mask.sum(1).min())
    given = 1 if decodes else max(1, shortest // 2)
    longest = labels.shape[1] if decodes else ids.shape[1] - given
    prompt = ids if decodes else ids[:, :given]
    seen = mask if decodes and mask is not None else torch.ones_like(prompt)
    training = inner.training
    inner.eval()
    try:
        found = inner.generate(input_ids=prompt, attention_mask=seen, max_new_tokens=max(1, longest), **options)
    finally:
        inner.train(training)
    counted = _before_the_end(found[:, given:], config)
    answer = found[:, given:].masked_fill(~counted, IGNORED)
    if decodes:
        return {**{k: v for k, v in batch.items() if k != "decoder_input_ids"}, "labels": answer}
    rows = torch.cat([torch.ones_like(found[:, :given], dtype=torch.bool), counted], 1)
    labels = torch.cat([torch.full_like(found[:, :given], IGNORED), answer], 1)
    return {**batch, "input_ids": found, "attention_mask": rows.to(ids.dtype), "labels": labels}


def _before_the_end(ids: Tensor, config: Any) -> Tensor:
    """True up to and with the first end-of-sequence token of each row."""
    end = getattr(config, "eos_token_id", None)
    if end is None:
        return torch.ones_like(ids, dtype=torch.bool)
    ends = torch.isin(ids, torch.as_tensor(end, device=ids.device)).long()
    return (ends.cumsum(1) - ends) == 0
