"""Decoding images, and cropping and resizing them, by PIL as timm does.

The same choices as timm's `Image.open(...).convert("RGB")`: alpha is dropped, not composited; CMYK
is converted by PIL's simple formula; EXIF orientation is not applied (check-data lists such files).
One difference: 16-bit grey is scaled to 8 bits, where PIL may clip it to white.

A one-channel profile reads the luma (PIL's "L") of the RGB image. Any other number of channels must
be stored in the files: LA, RGBA, RGBX and CMYK as they are, and .npy arrays [H, W, C] uint8.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from trainer.components.crops import evaluation_geometry
from trainer.data.index import DataError

NO_ANTIALIAS = -1  # bilinear, without the smoothing that is part of PIL's own filters
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear_no_antialias": NO_ANTIALIAS,
}
_ODD_MODES = {
    "CMYK": "CMYK",
    "P": "palette",
    "PA": "palette",
    "1": "1-bit",
    "LA": "alpha",
    "RGBA": "alpha",
}
_PLAIN_MODES = (
    "L",
    "LA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
)  # a byte per channel
_EXIF_ORIENTATION = 0x0112
_NPY_MAGIC = b"\x93NUMPY"
# Of PIL's formats only those of EXTENSIONS: others run programs (EPS runs Ghostscript) or have
# rarely audited decoders.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_LARGEST_FILE_MIB = 1024


class BadImage(DataError):
    """A file that does not decode: one line with its path and the reason."""


class _Unfit(ValueError):
    """An image that decodes but does not match the profile: what was found, and a remedy."""


class Planes:
    """An image of any number of channels, each a grey PIL image; with the methods of PIL's Image
    that are used here.

    PIL resizes the channels of an RGB image independently, so three planes give the same bytes.
    """

    def __init__(self, planes: Sequence[Image.Image]):
        self.planes = tuple(planes)
        self.size = self.width, self.height = self.planes[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """The part within (left, top, right, bottom)."""
        return Planes([plane.crop(box) for plane in self.planes])

    def resize(self, size: tuple[int, int], resampling: int) -> Planes:
        """Every channel at another (width, height)."""
        return Planes([plane.resize(size, resampling) for plane in self.planes])

    def tobytes(self) -> bytes:
        """The pixels, [height, width, C] uint8."""
        return np.stack([np.asarray(plane) for plane in self.planes], axis=-1).tobytes()


class Pixels:
    """An image in memory: [H, W] grey or [H, W, 3] uint8. Only the cropped part becomes a PIL
    image.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.size = pixels.shape[1], pixels.shape[0]

    def square(self, box: tuple[int, int, int, int], resampling: int, train_px: int) -> np.ndarray:
        """train_square of this image."""
        top, left, height, width = box
        part = np.ascontiguousarray(self.pixels[top : top + height, left : left + width])
        mode = "L" if part.ndim == 2 else "RGB"
        image = Image.frombuffer(mode, (width, height), part, "raw", mode, 0, 1)
        return _square_of(image, resampling, train_px)


def read_image(path: Path, channels: int = 3) -> Image.Image | Planes:
    """Decode one file, 8 bits per channel: to RGB, to luma ("L") for one channel, else to
    Planes.

    Raises BadImage with the path and the reason.
    """
    return decoded(path, content_of(path), channels)


def decoded(path: Path, content: bytes, channels: int) -> Image.Image | Planes:
    """read_image of a file whose bytes are read already. Raises BadImage."""
    with named(path):
        return in_channels(open_content(content), channels)


def content_of(path: Path) -> bytes:
    """The bytes of a file that may be an image. Raises BadImage."""
    with named(path):
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_FILE_MIB * 2**20:
            raise ValueError(f"not a regular file, or more than {_LARGEST_FILE_MIB} MiB")
        return path.read_bytes()


def oddities(path: Path, channels: int = 3) -> tuple[str, ...]:
    """What is unusual about a file that decodes: CMYK, palette, 1-bit, 16-bit grey, alpha,
    EXIF-rotated.

    Raises BadImage as read_image does.
    """
    return oddities_of(path, content_of(path), channels)


def oddities_of(path: Path, content: bytes, channels: int) -> tuple[str, ...]:
    """The same of a file whose bytes are read already. Raises BadImage."""
    with named(path):
        image = open_content(content)
        odd = (
            []
            if isinstance(image, np.ndarray)
            else _oddities_in(image, is_as_it_lies=channels not in (1, 3))
        )
        in_channels(image, channels)
        return tuple(odd)


def _oddities_in(image: Image.Image, is_as_it_lies: bool) -> list[str]:
    """What is unusual about an open image. is_as_it_lies: its channels are read as stored, so any
    mode is usual.
    """
    odd = [_ODD_MODES[image.mode]] if image.mode in _ODD_MODES and not is_as_it_lies else []
    if _is_16_bit(image):
        odd.append("16-bit grey")
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        odd.append("EXIF-rotated")
    return odd


def train_square(
    image: Image.Image | Planes, box: tuple[int, int, int, int], resampling: int, train_px: int
) -> np.ndarray:
    """Crop, then resize: the pixels [C, train_px, train_px] uint8, C = 1 for a grey image.

    box: (top, left, height, width) in the image's pixels. Cropped first, so that the filter never
    reads pixels outside the box, as in torchvision's resized_crop.
    """
    top, left, height, width = box
    return _square_of(image.crop((left, top, left + width, top + height)), resampling, train_px)


def _square_of(part: Image.Image | Planes, resampling: int, train_px: int) -> np.ndarray:
    square = np.frombuffer(_resized(part, (train_px, train_px), resampling).tobytes(), np.uint8)
    return square.reshape(train_px, train_px, -1).transpose(2, 0, 1)


def _resized(
    image: Image.Image | Planes, size: tuple[int, int], resampling: int
) -> Image.Image | Planes:
    """An image at another (width, height)."""
    if resampling != NO_ANTIALIAS:
        return image.resize(size, resampling)
    width, height = image.size
    pixels = np.frombuffer(bytearray(image.tobytes()), np.uint8).reshape(height, width, -1)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    made = functional.interpolate(planes, (size[1], size[0]), mode="bilinear")[0]
    return _of_array(made.permute(1, 2, 0).numpy(), pixels.shape[2])


def evaluation_square(
    image: Image.Image | Planes, test_px: int, test_crop_share: float, interpolation: str
) -> bytes:
    """Resize by the shorter side, then keep the centre: the pixels of a [test_px, test_px, C]
    square, as timm's.
    """
    (height, width), (top, left, *_) = evaluation_geometry(
        image.height, image.width, test_px, test_crop_share
    )
    if image.size != (width, height):
        image = _resized(image, (width, height), RESAMPLING[interpolation])
    return image.crop((left, top, left + test_px, top + test_px)).tobytes()


def stack_squares(squares: list[bytes], side_px: int) -> np.ndarray:
    """Squares of the same size and channels as one array [B, side_px, side_px, C] uint8."""
    return np.frombuffer(bytearray().join(squares), np.uint8).reshape(
        len(squares), side_px, side_px, -1
    )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises for damaged bytes into one line with the file's path."""
    try:
        yield
    except _Unfit as error:
        raise BadImage(f"{path}: {error}") from None
    except Exception as error:
        reason = (
            "not an image"
            if isinstance(error, UnidentifiedImageError)
            else " ".join(str(error).split())
        )
        reason = reason or type(error).__name__
        remedy = "use an intact file, or bad_images=skip in training"
        raise BadImage(f"{path}: cannot be decoded ({reason}); {remedy}") from None


def open_content(content: bytes) -> Image.Image | np.ndarray:
    """The bytes of an image file as an undecoded image, or as the array of an .npy file. Raises
    whatever a decoder raises.
    """
    if not content:
        raise ValueError("0 bytes")
    if content.startswith(_NPY_MAGIC):
        return np.load(io.BytesIO(content), allow_pickle=False)
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def in_channels(image: Image.Image | np.ndarray, channels: int) -> Image.Image | Planes:
    """Decode it into a number of channels: 3 is RGB, 1 is luma, any other must be stored."""
    if isinstance(image, np.ndarray):
        return _of_array(image, channels)
    if channels == 3:
        return _to_rgb(image)
    if channels == 1:
        return (image if image.mode == "L" else _to_rgb(image)).convert("L")
    found = len(image.getbands()) if image.mode in _PLAIN_MODES else 1
    if found != channels:
        raise _other_channels(f"{found} (mode {image.mode})", channels)
    return Planes(image.split())


def _of_array(array: np.ndarray, channels: int) -> Image.Image | Planes:
    """An array as stored: [H, W, C] uint8, or [H, W] for one channel."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise _Unfit(
            f"an array {list(array.shape)} of {array.dtype}; use [height, width, channels] of uint8"
        )
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] != channels:
        raise _other_channels(str(array.shape[2]), channels)
    if channels == 3:
        return Image.fromarray(np.ascontiguousarray(array))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(array, 2, 0)]
    return planes[0] if channels == 1 else Planes(planes)


def _other_channels(found: str, channels: int) -> _Unfit:
    return _Unfit(
        f"channels: {found}, where the profile has {channels}; use your own profile with channels, "
        "mean and std (data=<its .yaml>), or bad_images=skip in training"
    )


def _is_16_bit(image: Image.Image) -> bool:
    # PIL before 11 opens 16-bit PNG as "I"
    return image.mode == "I" or image.mode.startswith("I;16")


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        grey = (np.asarray(image).astype(np.int64) + 128) // 257  # 65535 / 257 = 255
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    return image.convert("RGB")
