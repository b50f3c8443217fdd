"""The embedded digits: real images, the same split for the same seed, normalised, every class on both sides."""

from __future__ import annotations

import builtins
from collections import Counter
from typing import Any

import pytest
import torch

from pykd.data import batches, load_digits
from pykd.errors import DataError


def test_sizes_shapes_and_types() -> None:
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1197, 600)
    batch = data.example(5)
    assert batch["pixel_values"].shape == (5, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert data.class_names == tuple("0123456789")


def test_pixels_are_normalised_and_in_range() -> None:
    data = load_digits(image_size=8, channels=1)
    pixels = torch.cat([b["pixel_values"] for b in batches(data.train, data.collate, 400)])
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02
    raw = pixels * 0.3760 + 0.3053
    assert raw.min() > -1e-6 and raw.max() < 1 + 1e-6


def test_resizing_keeps_the_stored_pixels_at_eight() -> None:
    data = load_digits(image_size=8, channels=1)
    raw = (data.test[0]["pixel_values"] * 0.3760 + 0.3053) * 16
    torch.testing.assert_close(raw[0], data.test.images[0].float(), atol=1e-4, rtol=0)  # type: ignore[attr-defined]


def test_the_held_out_images_are_stratified_and_apart() -> None:
    data = load_digits(image_size=8)
    counts = Counter(data.test[i]["labels"] for i in range(600))
    assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) <= 4
    train = {data.train.images[i].numpy().tobytes() for i in range(1197)}  # type: ignore[attr-defined]
    test = {data.test.images[i].numpy().tobytes() for i in range(600)}  # type: ignore[attr-defined]
    assert train & test == set()


def test_the_seed_decides_the_split_and_the_fingerprint() -> None:
    one, same, other = load_digits(seed=1), load_digits(seed=1), load_digits(seed=2)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert load_digits(seed=1, image_size=32).fingerprint != one.fingerprint
    assert torch.equal(one.example(9)["pixel_values"], same.example(9)["pixel_values"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "image_size must be at least 8.*got 7"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"test_size": 1790}, "test_size=1790 does not fit 'digits'.*between 1 and 1787"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_digits(**options)


def test_without_scikit_learn_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"install it with `pip install 'pykd\[reports\]'`"):
        load_digits()
