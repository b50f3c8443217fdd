"""Pictures that are not what they seem."""

from __future__ import annotations

import io
import struct
import weakref
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from pykd.models.torchvision import load_torchvision
from pykd.serve.images import ImageClassifier, open_image, preprocess_of


def png(width: int, height: int) -> bytes:
    """A valid PNG of any size in a few bytes, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + -(-width // 8)) * min(height, 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    for side in (5_000, 9_999, 60_000):  # Pillow itself warns of the second and refuses the third
        with pytest.raises(ValueError, match=r"image 3 (has 25000000 pixels, allowed are 16777216|is no PNG)"):
            open_image(png(side, side), 1 << 24, "image 3")
    assert open_image(png(100, 100), 1 << 24, "image 3").size == (100, 100)


def test_one_picture_at_a_time_is_unpacked() -> None:
    alive: list[weakref.ref[object]] = []
    together: list[int] = []

    def shrink(picture: object) -> torch.Tensor:
        alive.append(weakref.ref(picture))
        together.append(sum(each() is not None for each in alive))
        return torch.zeros(3, 2, 2)

    model = load_torchvision("squeezenet1_1", num_classes=2)
    classifier = ImageClassifier(model, ("a", "b"), shrink, max_pixels=1 << 20, all_pixels=5 * 900 * 900)
    assert len(classifier.prepare([png(900, 900)] * 5)) == 5
    assert together == [1] * 5
    with pytest.raises(ValueError, match="the images have 4860000 pixels together, allowed are 4050000: send fewer"):
        classifier.prepare([png(900, 900)] * 6)
    assert together == [1] * 5, "nothing is unpacked before all have been counted"


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"%PDF-1.4", b"GIF89a" + bytes(20), png(64, 4000)[:48]])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="it is no PNG, JPEG, WEBP, BMP that can be read"):
        open_image(content, 1 << 20, "it")


def test_modes_and_transparency(tmp_path: Path) -> None:
    prepare = preprocess_of(tmp_path, load_torchvision("squeezenet1_1", num_classes=2), {"image_size": [32, 48]})
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        buffer = io.BytesIO()
        Image.new(mode, (5, 4), 1).save(buffer, "PNG")
        found = prepare(open_image(buffer.getvalue(), 100, "it"))
        assert found.shape == (3, 32, 48) and found.dtype == torch.float32


def test_a_folder_with_an_image_processor_is_prepared_by_it(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    picture = Image.new("L", (30, 20), 200)
    found = preprocess_of(tmp_path, torch.nn.Identity(), {})(picture)
    assert found.shape == (3, 8, 8)
    assert torch.equal(found, processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0])
