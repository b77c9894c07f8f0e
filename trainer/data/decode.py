"""Decoding images, and cropping and resizing them, by PIL as timm does.

The same choices as timm's `Image.open(...).convert("RGB")`: alpha is dropped, not composited; CMYK
is converted by PIL's simple formula; EXIF orientation is not applied (check-data lists such files).
One difference: deep grey (12 or 16 bits) is scaled to 8 bits by its file format's white, where PIL
may clip it. Pixels of 32 bits, signed or float have no known white: such an image is refused.

A one-channel profile reads the luma (PIL's "L") of the RGB image. Any other number of channels must
be stored in the files: LA, RGBA, RGBX and CMYK as they are, and .npy arrays [H, W, C] uint8.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from trainer.base.disk import why
from trainer.base.errors import DataError
from trainer.base.signals import Stopped
from trainer.components.crops import CropMode, evaluation_geometry

NO_ANTIALIAS = -1  # bilinear, without the smoothing that is part of PIL's own filters
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear_no_antialias": NO_ANTIALIAS,
}
Box = tuple[float, float, float, float]  # (left, top, right, bottom) in px
_ROWS_AT_ONCE = 256
_ODD_MODES = {
    "CMYK": "CMYK",
    "P": "palette",
    "PA": "palette",
    "1": "1-bit",
    "LA": "alpha",
    "RGBA": "alpha",
}
# a byte per channel
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
)
_EXIF_ORIENTATION = 0x0112
EXIF_ROTATED = "EXIF-rotated"
_ROTATED = range(2, 9)  # 1 is upright; no other value means anything
_DARK_BELOW = 4096  # of 16-bit grey that holds nothing brighter: probably 12 bits, unscaled
_NPY_MAGIC = b"\x93NUMPY"
# Of PIL's formats only those of EXTENSIONS: others run programs (EPS runs Ghostscript) or have
# rarely audited decoders.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")
_LARGEST_FILE_MIB = 1024
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# A resized image of more pixels is never made: 2 x 60,000 px would become 256 x 7,680,000.
_MOST_RESIZED_PX = 2**26
_UNREAD_FORMATS = {  # the first bytes of formats that people have, to name them
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\x01\0": "ICO",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"%!PS": "EPS",
    b"<svg": "SVG",
}
# of an ISO media file, at its byte 8
_UNREAD_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC"} | {
    b"mif1": "HEIC",
    b"msf1": "HEIC",
}


class Readable(Protocol):
    """A file, or what is read as one; str() of it names it for people."""

    def read_bytes(self) -> bytes: ...


class BadImage(DataError):
    """A file that does not decode: one line with its path and the reason."""

    def with_remedy(self, remedy: str) -> BadImage:
        """The same with one more way out."""
        return self.raised_as(BadImage, hint=", or ".join(filter(None, (self.hint, remedy))))


class DataTrouble(Stopped):
    """What keeps images away that are not to blame: a network folder that is gone, no descriptor or
    memory left, a loader process that is killed again and again. No other image takes their place;
    a run that still has them not after a while saves and ends, to be resumed.
    """


class _Unfit(ValueError):
    """An image that decodes, but not into what is wanted: what was found, and a remedy."""

    def __init__(self, found: str, hint: str):
        super().__init__(found)
        self.hint = hint


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

    def resize(self, size: tuple[int, int], resampling: int, box: Box | None = None) -> Planes:
        """Every channel at another (width, height); box: of that part alone."""
        return Planes([plane.resize(size, resampling, box) for plane in self.planes])

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
    """What is unusual about a file that decodes: CMYK, palette, 1-bit, 16-bit, alpha,
    EXIF-rotated or malformed EXIF.

    Raises BadImage as read_image does.
    """
    return oddities_of(path, content_of(path), channels)


def oddities_of(path: Path, content: bytes, channels: int) -> tuple[str, ...]:
    """The same of a file whose bytes are read already. Raises BadImage."""
    return inspected(path, content, channels)[0]


def inspected(
    path: Path, content: bytes, channels: int
) -> tuple[tuple[str, ...], Image.Image | Planes]:
    """What is unusual about a file whose bytes are read already, and its image. Raises BadImage."""
    with named(path):
        image = open_content(content)
        if isinstance(image, np.ndarray):
            return (), in_channels(image, channels)
        odd = _odd_pixels(image, is_as_it_lies=channels not in (1, 3))
        decoded = in_channels(image, channels)
        return (*odd, *_odd_exif(image)), decoded


def _odd_pixels(image: Image.Image, is_as_it_lies: bool) -> list[str]:
    """What is unusual about an image that is not decoded yet. is_as_it_lies: its channels are read
    as stored, so any mode is usual.
    """
    odd = [_ODD_MODES[image.mode]] if image.mode in _ODD_MODES and not is_as_it_lies else []
    white = _white(image)
    if white is not None:
        is_dark = np.asarray(image).max() < _DARK_BELOW < white
        odd.append(f"16-bit grey{', nothing above 4095: nearly black' if is_dark else ''}")
    elif ";16" in _raw_mode(image):
        odd.append("16-bit colour")
    return odd


def _odd_exif(image: Image.Image) -> list[str]:
    """What is unusual about the metadata of a decoded image."""
    try:
        rotated = image.getexif().get(_EXIF_ORIENTATION) in _ROTATED
    except Exception:  # whatever PIL raises for damaged metadata: the pixels do not need them
        return ["malformed EXIF"]
    return [EXIF_ROTATED] * rotated


def check_header(path: Path, content: bytes, channels: int) -> None:
    """Refuse a file that does not open, or not in so many channels. One without its format's end
    mark, as a cut download has none, is decoded whole.

    Raises BadImage as read_image does.
    """
    with named(path):
        image = open_content(content)
        end = None if isinstance(image, np.ndarray) else _END_MARKS.get(str(image.format))
        is_cut = end is not None and not content.rstrip(b"\0").endswith(end)
        if is_cut or channels not in (1, 3) or isinstance(image, np.ndarray):
            in_channels(image, channels)
        else:
            _white(image)


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


def _nearest_four(image: Image.Image | Planes, size: tuple[int, int], part: Box) -> bytes:
    """A part of an image at another (width, height): bilinear between its four nearest pixels."""
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)
    made: np.ndarray = pixels
    for axis, (low, high, number) in enumerate(
        ((part[1], part[3], size[1]), (part[0], part[2], size[0]))
    ):
        places = low + (np.arange(number) + 0.5) * (high - low) / number - 0.5
        places = places.clip(0, pixels.shape[axis] - 1)
        first = places.astype(np.intp)
        second = np.minimum(first + 1, pixels.shape[axis] - 1)
        share = np.expand_dims(places - first, (1, 2) if axis == 0 else (0, 2))
        made = (1 - share) * made.take(first, axis) + share * made.take(second, axis)
    return np.rint(made).astype(np.uint8).tobytes()


def evaluation_square(
    image: Image.Image | Planes,
    test_px: int,
    test_crop_share: float,
    interpolation: str,
    mode: CropMode = "center",
    fill: Sequence[int] = (0,),
) -> bytes:
    """Resize as the crop mode says, then keep the centre: the pixels of a [test_px, test_px, C]
    square, as timm's. fill: the colour beyond the image's edge, one value a channel.
    """
    (height, width), (top, left, *_) = evaluation_geometry(
        image.height, image.width, test_px, test_crop_share, mode
    )
    right, bottom = min(left + test_px, width), min(top + test_px, height)
    kept = max(left, 0), max(top, 0), right, bottom
    pixels = _kept_part(image, (width, height), kept, RESAMPLING[interpolation])
    size = bottom - kept[1], right - kept[0]
    if size == (test_px, test_px):
        return pixels
    inner = np.frombuffer(pixels, np.uint8).reshape(*size, -1)
    colour = fill if len(fill) == inner.shape[2] else [round(sum(fill) / len(fill))]
    square = np.empty((test_px, test_px, inner.shape[2]), np.uint8)
    square[:] = colour
    first_row, first_column = max(-top, 0), max(-left, 0)
    square[first_row : first_row + size[0], first_column : first_column + size[1]] = inner
    return square.tobytes()


def _kept_part(
    image: Image.Image | Planes, size: tuple[int, int], kept: tuple[int, ...], filter_: int
) -> bytes:
    """The pixels of the box `kept` (left, top, right, bottom) of an image at another (width,
    height).
    """
    width, height = size
    left, top, right, bottom = kept
    if height * width > _MOST_RESIZED_PX:  # the kept part alone: the same to rounding
        across, down = image.width / width, image.height / height
        edges = min(image.width, right * across), min(image.height, bottom * down)
        part = (left * across, top * down, *edges)
        if filter_ == NO_ANTIALIAS:
            return _nearest_four(image, (right - left, bottom - top), part)
        return image.resize((right - left, bottom - top), filter_, part).tobytes()
    if image.size != size:
        image = _resized(image, size, filter_)
    return image.crop((left, top, right, bottom)).tobytes()


def whole_image(image: Image.Image | Planes, short_px: int, interpolation: str) -> np.ndarray:
    """All of an image, its shorter side resized to short_px: [h, w, C] uint8."""
    shorter = min(image.size)
    width, height = (max(1, int(short_px * side / shorter)) for side in image.size)
    if image.size != (width, height):
        image = _resized(image, (width, height), RESAMPLING[interpolation])
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, -1)


def stack_squares(squares: list[bytes], side_px: int) -> np.ndarray:
    """Squares of the same size and channels as one array [B, side_px, side_px, C] uint8."""
    return np.frombuffer(bytearray().join(squares), np.uint8).reshape(
        len(squares), side_px, side_px, -1
    )


@contextmanager
def named(path: Readable) -> Iterator[None]:
    """Turn whatever a decoder raises for damaged bytes into one line with the file's path.

    Raises BadImage, or DataTrouble for what the system says of reading, not of the image.
    """
    try:
        yield
    except _Unfit as error:
        raise BadImage(str(error), error.hint, place=str(path)) from None
    except MemoryError:
        raise DataTrouble(f"unreadable data ({path}: not enough memory)") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not _is_files_own(error, path):
            name = errno.errorcode.get(error.errno, str(error.errno))
            raise DataTrouble(f"unreadable data ({path}: {name}, {why(error)})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        found = f"cannot be decoded ({reason})"
        raise BadImage(found, "use an intact file", place=str(path)) from None


def _is_files_own(error: OSError, path: Readable) -> bool:
    """Is it one file that is missing or no file, not the folder or the disk that it is on?"""
    if error.errno == errno.ENOENT:
        return os.path.isdir(getattr(path, "parent", ""))
    return error.errno in (errno.ELOOP, errno.EISDIR)


def open_content(content: bytes) -> Image.Image | np.ndarray:
    """The bytes of an image file as an undecoded image, or as the array of an .npy file. Raises
    whatever a decoder raises.
    """
    if not content:
        raise ValueError("0 bytes")
    if content.startswith(_NPY_MAGIC):
        return np.load(io.BytesIO(content), allow_pickle=False)
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        unread = _unread_format(content)
    if unread:
        raise _Unfit(f"cannot be decoded (the format {unread} is not read)", "use JPEG or PNG")
    raise ValueError("not an image")


def _unread_format(content: bytes) -> str | None:
    """The name of a known format that is not among _FORMATS."""
    if content[4:8] == b"ftyp":
        return _UNREAD_BRANDS.get(content[8:12])
    found = (name for magic, name in _UNREAD_FORMATS.items() if content.startswith(magic))
    return next(found, None)


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
            f"an array {list(array.shape)} of {array.dtype}",
            "use [height, width, channels] of uint8",
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
        f"channels: {found}, where the profile has {channels}",
        "use your own profile with channels, mean and std (data=<its .yaml>)",
    )


def _white(image: Image.Image) -> int | None:
    """The value of white in a grey image of more than 8 bits, None for any other image.

    Raises _Unfit for pixels whose white no format defines: 32-bit, signed and float.
    """
    if image.mode.startswith("I;16"):
        return 4095 if _raw_mode(image) == "I;12" else 65535
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # PIL's mode for their 16 bits
        return 65535
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "32-bit or signed"
        raise _Unfit(
            f"{kind} pixels (mode {image.mode}): no rule scales them to 8 bits",
            "use 8 or 16 bits unsigned",
        )
    return None


def _raw_mode(image: Image.Image) -> str:
    """PIL's name for the pixels as they lie in the file, empty where it tells none."""
    tiles = getattr(image, "tile", None)  # an ImageFile's alone
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _to_rgb(image: Image.Image) -> Image.Image:
    white = _white(image)
    if white is not None:
        values = np.asarray(image)
        grey = np.empty(values.shape, dtype=np.uint8)
        for top in range(0, len(grey), _ROWS_AT_ONCE):  # int64 of a whole image would be 8 times it
            rows = slice(top, top + _ROWS_AT_ONCE)
            scaled = (values[rows].astype(np.int64) * 255 + white // 2) // white
            grey[rows] = np.clip(scaled, 0, 255)
        image = Image.fromarray(grey)
    return image.convert("RGB")
