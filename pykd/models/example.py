"""An input that a model accepts, for tracing it and for trying it where there is no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pykd.models.adapter import unwrap

#: Side of the image that a model is tried with when nothing says what it was made for.
IMAGE_SIZE = 224


def example_batch(
    model: nn.Module,
    *,
    rows: int = 1,
    length: int = 8,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Token numbers for models of text, an image for others, by the names that the model's `forward` has.

    rows, length: of the token numbers. image_size, channels: where the model's configuration does not tell (224, 3).
    seed: draw the content from it; None gives counting token numbers and black images.

    >>> example_batch(nn.Conv2d(3, 4, 3), image_size=32)["pixel_values"].shape
    torch.Size([1, 3, 32, 32])
    """
    model = unwrap(model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "pixel_values") == "input_ids":
        words = config.get_text_config().vocab_size
        ids = torch.arange(1, length + 1).expand(rows, -1) % words
        if generator is not None:
            ids = torch.randint(0, words, (rows, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return batch | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    size = getattr(config, "image_size", None) or image_size or IMAGE_SIZE
    depth = getattr(config, "num_channels", None) or channels or 3
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (rows, depth, height, width)
    return {"pixel_values": torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)}
