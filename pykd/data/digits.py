"""The real handwritten digits that ship inside scikit-learn: data for a run without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pykd.data.bundle import DataBundle, Item, digest, stack, stratified_split
from pykd.errors import DataError

#: Mean and standard deviation of all pixels, scaled to 0..1.
MEAN, STD = 0.3053, 0.3760


class Digits:
    """One split: 8x8 grey images (uint8, 0..16) that are scaled up, repeated over channels and normalised when read."""

    def __init__(self, images: Tensor, labels: Sequence[int], image_size: int, channels: int) -> None:
        self.images, self.labels = images, list(labels)
        self.image_size, self.channels = image_size, channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        image = self.images[index][None, None].float() / 16
        shape = (self.image_size, self.image_size)
        image = F.interpolate(image, shape, mode="bilinear", align_corners=False)[0]
        return {
            "pixel_values": ((image - MEAN) / STD).expand(self.channels, -1, -1),
            "labels": self.labels[index],
        }


def load_digits(*, image_size: int = 64, test_size: int = 600, seed: int = 0, channels: int = 3) -> DataBundle:
    """1,797 handwritten digits ("Optical Recognition of Handwritten Digits", Alpaydin & Kaynak 1998; 10 classes).

    Images of 8x8 pixels are resized bilinearly to ``image_size`` (at least 8), repeated over ``channels`` (1 or 3) and
    normalised to mean 0, deviation 1. ``test_size`` images are held out, stratified by class, chosen by ``seed``.

    Raises DataError for values outside these ranges, and when scikit-learn is not installed.

    >>> data = load_digits(image_size=16)
    >>> len(data.train), len(data.test), data.example(4)["pixel_values"].shape
    (1197, 600, torch.Size([4, 3, 16, 16]))
    """
    if image_size < 8:
        raise DataError(f"image_size must be at least 8, the size of the stored digits, got {image_size}")
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 or 3, got {channels}")
    images, labels = _embedded()
    train, test = stratified_split(labels, test_size, seed=seed, name="digits")
    preprocessing: dict[str, Any] = {
        "image_size": image_size,
        "channels": channels,
        "resize": "bilinear",
        "mean": MEAN,
        "std": STD,
        "seed": seed,
    }
    return DataBundle(
        train=Digits(images[train], [labels[i] for i in train], image_size, channels),
        test=Digits(images[test], [labels[i] for i in test], image_size, channels),
        collate=stack,
        class_names=tuple(str(digit) for digit in range(10)),
        name="digits",
        fingerprint=digest(["digits", images.numpy().tobytes(), labels, test, sorted(preprocessing.items())]),
        preprocessing=preprocessing,
    )


def _embedded() -> tuple[Tensor, list[int]]:
    try:
        from sklearn import datasets
    except ImportError:
        raise DataError("the digits ship inside scikit-learn: install it with `pip install 'pykd[reports]'`") from None
    bunch = datasets.load_digits()
    return torch.tensor(bunch.images, dtype=torch.uint8), [int(label) for label in bunch.target]
