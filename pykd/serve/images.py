"""Image classifiers behind the service: pictures are opened with care and made what the model was trained on."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pykd.models.example import IMAGE_SIZE
from pykd.monitoring import HeadInputs
from pykd.serve.predictors import Answer, Input, classify

#: Formats that are opened, by Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: Mean and deviation of ImageNet's channels, which torchvision's weights are made for.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Preprocess = Callable[[Any], Tensor]


class ImageClassifier:
    """One class an image."""

    task, takes = "image-classification", "image"

    def __init__(
        self, model: nn.Module, labels: tuple[str, ...], preprocess: Preprocess, *, max_pixels: int, all_pixels: int
    ) -> None:
        """max_pixels: of an image; all_pixels: of those of one request together."""
        self.model, self.labels, self.preprocess = model, labels, preprocess
        self.max_pixels, self.all_pixels = max_pixels, all_pixels
        self.head = HeadInputs(model)

    def prepare(self, inputs: Sequence[bytes]) -> list[Input]:
        pixels = sum(measured(content, self.max_pixels, f"image {number}") for number, content in enumerate(inputs))
        if pixels > self.all_pixels:  # few bytes can hold many, and to unpack them takes the time of everyone
            raise ValueError(f"the images have {pixels} pixels together, allowed are {self.all_pixels}: send fewer")
        # Each is made small before the next is unpacked: a few bytes can hold as many pixels as are allowed.
        return [self._ready(content, f"image {number}") for number, content in enumerate(inputs)]

    def _ready(self, content: bytes, name: str) -> Input:
        return Input(1, self.preprocess(open_image(content, self.max_pixels, name)))

    def compute(self, inputs: list[Input]) -> list[Answer]:
        return classify(self.model, {"pixel_values": torch.stack([one.content for one in inputs])}, self.head)


def open_image(content: bytes, max_pixels: int, name: str) -> Any:
    """A picture as Pillow has it; its size is checked before any pixel is decoded.

    Raises ValueError, which begins with ``name``, for what is no picture of a known format, or too large, or damaged.
    """
    measured(content, max_pixels, name)
    with _readable(name):
        picture = _opened(content)
        picture.load()
    return picture


def measured(content: bytes, max_pixels: int, name: str) -> int:
    """How many pixels a picture says it has, none of which is decoded. Raises ValueError as :func:`open_image`."""
    with _readable(name):
        picture = _opened(content)
    pixels: int = picture.width * picture.height
    if pixels > max_pixels:
        raise ValueError(f"{name} has {pixels} pixels, allowed are {max_pixels}: scale it down")
    return pixels


def _opened(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=FORMATS)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every format raises what it likes; Pillow's own bomb check, too
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is no {', '.join(FORMATS)} that can be read ({reason})") from None


def preprocess_of(folder: Path, model: nn.Module, made_for: Mapping[str, Any]) -> Preprocess:
    """The preparation that a folder names, by transformers' image processor; else the one the data was made by.

    made_for: `image_size`, `channels`, `mean` and `std` of the training data, as pykd saves them.
    """
    if (folder / "preprocessor_config.json").exists():
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return lambda picture: processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    config: Any = getattr(model, "config", None)
    size = made_for.get("image_size") or getattr(config, "image_size", None) or IMAGE_SIZE
    channels = made_for.get("channels") or getattr(config, "num_channels", None) or 3
    means, deviations = made_for.get("mean", MEAN), made_for.get("std", STD)
    shift, scale = (torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (means, deviations))
    shape = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    mode = "L" if channels == 1 or shift.numel() == 1 else "RGB"

    def preprocess(picture: Any) -> Tensor:
        converted = picture.convert(mode)
        pixels = torch.frombuffer(bytearray(converted.tobytes()), dtype=torch.uint8)
        planes = pixels.reshape(converted.height, converted.width, -1).permute(2, 0, 1)
        values = F.interpolate(planes[None].float() / 255, shape, mode="bilinear", antialias=True)[0]
        return ((values - shift) / scale).expand(channels, -1, -1)

    return preprocess
