"""From a file to pixels, and from an image to a square of them: by PIL, as timm does it.

What timm's `Image.open(...).convert("RGB")` decides is decided here too: alpha is dropped, not composited; CMYK goes by
PIL's plain formula; EXIF orientation is not applied (check-data lists such files). One thing differs: 16-bit grey is
scaled to 8 bits, where PIL may clip it to white.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from trainer.data.index import DataError
from trainer.ingredients.crops import evaluation_geometry

warnings.filterwarnings("ignore", module=r"PIL\.")  # advice about files (palettes, EXIF, size), which check-data lists

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ODD_MODES = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "1": "1-bit", "LA": "alpha", "RGBA": "alpha"}
_EXIF_ORIENTATION = 0x0112


class BadImage(DataError):
    """A file that does not decode to an image: one line with its path and the reason."""


def read_image(path: Path) -> Image.Image:
    """Decode one file to RGB, 8 bits per channel.

    Raises BadImage with the path and the reason.
    """
    with _named(path):
        return _to_rgb(_open(path))


def oddities(path: Path) -> tuple[str, ...]:
    """What is unusual about a file that decodes: CMYK, palette, 1-bit, 16-bit grey, alpha, EXIF-rotated.

    Raises BadImage as read_image does.
    """
    with _named(path):
        image = _open(path)
        odd = [_ODD_MODES[image.mode]] if image.mode in _ODD_MODES else []
        if _is_16_bit(image):
            odd.append("16-bit grey")
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            odd.append("EXIF-rotated")
        _to_rgb(image)
        return tuple(odd)


def train_square(image: Image.Image, box: tuple[int, int, int, int], resampling: int, train_px: int) -> bytes:
    """Crop, then resize: the pixels of a [train_px, train_px, C] square, C = 1 for a grey image.

    box: (top, left, height, width) in the image's own pixels. Cropping comes first, so that the filter never sees what
    lies outside the box, as in torchvision's resized_crop.
    """
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    return part.resize((train_px, train_px), resampling).tobytes()


def evaluation_square(image: Image.Image, test_px: int, test_crop_share: float, interpolation: str) -> bytes:
    """Resize by the shorter side, then keep the centre: the pixels of a [test_px, test_px, C] square, as timm's."""
    (height, width), (top, left, *_) = evaluation_geometry(image.height, image.width, test_px, test_crop_share)
    if image.size != (width, height):
        image = image.resize((width, height), RESAMPLING[interpolation])
    return image.crop((left, top, left + test_px, top + test_px)).tobytes()


def stack_squares(squares: list[bytes], side_px: int) -> np.ndarray:
    """Squares of one size and one number of channels as one array [B, side_px, side_px, C] uint8."""
    return np.frombuffer(bytearray().join(squares), np.uint8).reshape(len(squares), side_px, side_px, -1)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises over anybody's bytes into one line about the file."""
    try:
        yield
    except Exception as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        reason = reason or type(error).__name__
        remedy = "a whole image would do, or bad_images=skip in training"
        raise BadImage(f"{path}: cannot be decoded ({reason}); {remedy}") from None


def _open(path: Path) -> Image.Image:
    content = path.read_bytes()
    if not content:
        raise ValueError("0 bytes")
    return Image.open(io.BytesIO(content))


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")  # PIL before 11 opens 16-bit PNG as "I"


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        grey = (np.asarray(image).astype(np.int64) + 128) // 257  # 65535 / 257 = 255
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    return image.convert("RGB")
