"""Partial decoding of JPEG files for training, only as far as a crop needs: faster than PIL, and
the same within a few grey levels.

Three savings over decoding by PIL, each skipped for files that do not allow it:
    rows     below the crop are not decoded: the pixels above them are the same, bit for bit
    scale    a crop of at least 2, 4 or 8 times the wanted size is decoded at 1/2, 1/4 or 1/8 by a
             smaller inverse cosine transform
    resize   by torch where no scale is used: its filter is PIL's up to rounding

Compared with PIL (decode all, crop, resize) the mean difference of a square is under
TOLERANCE_LEVELS (of 255) where no scale is used, mostly a tenth of that; where one is, the mean
over squares is under SCALED_LEVELS. Evaluation does not use this: its images are PIL's byte for
byte.

Files other than plain color or grey JPEGs, without an end marker, or on which the decoder fails are
left to PIL to decode or reject. So the same files are bad, except for damage entirely below a crop.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from trainer.data.decode import NO_ANTIALIAS, RESAMPLING, Planes, content_of, decoded, train_square

try:
    import simplejpeg
except ImportError:  # no wheel for this machine: PIL does it all
    simplejpeg = None

TOLERANCE_LEVELS = 0.5
SCALED_LEVELS = 3.0
DAMAGED = "JPEG with damaged or missing data"  # a kind of unusual image, see is_damaged
_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _SCAN = (0xC0, 0xC1), 0xDA
_STANDALONE = range(0xC2, 0xD0)  # other frame types, but for DHT (C4) and DAC (CC): plain segments
_PLAIN_SEGMENTS = (0xC4, 0xCC)
_MODES = {value: name for name, value in RESAMPLING.items()}


class Jpeg:
    """A JPEG file of which only the header has been read, with the methods that training uses.

    size: (width, height) of the whole image in px.
    """

    def __init__(
        self, path: Path, content: bytes, size: tuple[int, int], pixels: np.ndarray | None = None
    ):
        self.path, self.content, self.size, self._pixels = path, content, size, pixels
        self.width, self.height = size

    def decoded_for(
        self, crops: list[tuple[tuple[int, int, int, int], int]], train_px: int
    ) -> Jpeg:
        """The same file, already decoded as far as its squares need, if at least two are decoded at
        full scale. crops: (box, filter) of each.

        Each square is the same as if decoded alone, bit for bit. Not done at smaller scales, where
        the filter reads across the box's edge and so depends on how far the file was decoded.
        """
        lowest = [
            top + height
            for (top, _, height, width), resampling in crops
            if _scale(min(height, width), train_px, resampling) == 1
        ]
        if len(lowest) < 2:
            return self
        try:
            content, _ = first_rows(self.content, max(lowest), self.height)
            return Jpeg(
                self.path,
                self.content,
                self.size,
                simplejpeg.decode_jpeg(content, "RGB", strict=False),
            )
        except Exception:  # then each is tried alone
            return self

    def square(self, box: tuple[int, int, int, int], resampling: int, train_px: int) -> np.ndarray:
        """The pixels [3, train_px, train_px] uint8 within a box (top, left, height, width).

        Raises BadImage.
        """
        try:
            return self._square(box, resampling, train_px)
        except Exception:  # whatever a decoder raises for damaged bytes: PIL decides
            return train_square(decoded(self.path, self.content, 3), box, resampling, train_px)

    def _square(self, box: tuple[int, int, int, int], resampling: int, train_px: int) -> np.ndarray:
        top, left, height, width = box
        scale = _scale(min(height, width), train_px, resampling)
        if scale == 1 and self._pixels is not None:
            return resized(self._pixels, box, resampling, train_px)
        content, num_rows = first_rows(self.content, top + height, self.height)
        smallest = (
            {}
            if scale == 1
            else {"min_height": -(-num_rows // scale), "min_width": -(-self.width // scale)}
        )
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_factor=scale, strict=False, **smallest)
        if scale > 1:  # the box's edges lie between pixels then, which PIL can take
            edges = [edge / scale for edge in (left, top, left + width, top + height)]
            square = Image.fromarray(pixels).resize((train_px, train_px), resampling, box=edges)
            return np.asarray(square).transpose(2, 0, 1)
        return resized(pixels, box, resampling, train_px)


def resized(
    pixels: np.ndarray, box: tuple[int, int, int, int], resampling: int, train_px: int
) -> np.ndarray:
    """The part of an image [H, W, C] uint8 within a box (top, left, height, width), resized to
    [C, train_px, train_px]. resampling: a value of RESAMPLING.
    """
    top, left, height, width = box
    found = pixels[top : top + height, left : left + width]
    # torch warns of memory that cannot be written to, as a file's
    part = torch.from_numpy(found if found.flags.writeable else found.copy())
    part = part.permute(2, 0, 1)[None]
    mode, antialias = _MODES[resampling].partition("_")[0], resampling != NO_ANTIALIAS
    return interpolate(part, (train_px, train_px), mode=mode, antialias=antialias)[0].numpy()


def read_for_training(path: Path, channels: int = 3) -> Image.Image | Planes | Jpeg:
    """One file as training takes it: its header alone where it is a plain JPEG, else decoded as
    evaluation would.

    Raises BadImage.
    """
    return taken_for_training(path, content_of(path), channels)


def taken_for_training(path: Path, content: bytes, channels: int) -> Image.Image | Planes | Jpeg:
    """The same of a file whose bytes are read already. Raises BadImage."""
    size = plain_size(content) if simplejpeg is not None and channels == 3 else None
    return decoded(path, content, channels) if size is None else Jpeg(path, content, size)


def is_damaged(content: bytes) -> bool:
    """Does a JPEG lack data that decoders fill in with grey, without an error? Unknown, so no,
    without simplejpeg.
    """
    if simplejpeg is None or not content.startswith(_START):
        return False
    try:
        simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except Exception:  # whatever it raises for what libjpeg warns of
        return True
    return False


def decoder_name() -> str:
    """Who decodes JPEG files for training, with its version."""
    return "PIL" if simplejpeg is None else f"simplejpeg {version('simplejpeg')}"


def first_rows(content: bytes, num_rows: int, height: int) -> tuple[bytes, int]:
    """The file as one of fewer rows, if possible, and its number of rows: at least num_rows.

    The height in the header of a baseline file with one interleaved scan is reduced to whole
    blocks plus one more row of blocks, since color is interpolated between rows of blocks. Decoders
    then ignore the rest of the data.
    """
    place, block_px = _frame(content)
    rows = (-(-num_rows // block_px) + 1) * block_px if place else height
    if rows >= height:
        return content, height
    return b"".join((content[: place + 5], rows.to_bytes(2, "big"), content[place + 7 :])), rows


def _frame(content: bytes) -> tuple[int, int]:
    """The position of the frame header, and the height of its blocks in px; (0, 0) for other kinds
    of files.
    """
    place, found = 2, (0, 0)
    while place + 4 <= len(content) and content[place] == 0xFF:
        kind = content[place + 1]
        if kind in _BASELINE:
            num_colours = content[place + 9]
            found = (
                place,
                8 * max(content[place + 11 + 3 * colour] & 15 for colour in range(num_colours)),
            )
        elif kind == _SCAN:
            return found if found[0] and content[place + 4] == content[found[0] + 9] else (0, 0)
        elif kind in _STANDALONE and kind not in _PLAIN_SEGMENTS:
            return 0, 0
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return 0, 0


def plain_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a color or grey JPEG with an end marker; None for anything else, and for
    sizes that PIL rejects as decompression bombs.
    """
    if not (content.startswith(_START) and content.endswith(_END)):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    is_plain = colours in ("YCbCr", "RGB", "Gray") and 0 < height * width <= Image.MAX_IMAGE_PIXELS
    return (width, height) if is_plain else None


def _scale(side_px: int, train_px: int, resampling: int) -> int:
    """The largest of 1, 2, 4 and 8 by which a side may shrink without falling below train_px; 1
    where nothing is to be smoothed, as a smaller scale does.
    """
    if resampling == NO_ANTIALIAS:
        return 1
    return next(scale for scale in (8, 4, 2, 1) if side_px >= scale * train_px or scale == 1)
