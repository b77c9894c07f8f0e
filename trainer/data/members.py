"""The readers of image files, for images in files of many as well: from the same bytes the same image, by any road."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trainer.data import decode, jpeg
from trainer.data.decode import Planes
from trainer.data.jpeg import Jpeg
from trainer.data.packed import Member


def read_image(path: Path | Member, channels: int = 3) -> Image.Image | Planes:
    """decode.read_image. Raises BadImage."""
    return decode.decoded(path, _content(path), channels)


def read_for_training(path: Path | Member, channels: int = 3) -> Image.Image | Planes | Jpeg:
    """jpeg.read_for_training. Raises BadImage."""
    if isinstance(path, Path):
        return jpeg.read_for_training(path, channels)
    content = _content(path)
    size = jpeg.plain_size(content) if jpeg.simplejpeg is not None and channels == 3 else None
    return decode.decoded(path, content, channels) if size is None else Jpeg(path, content, size)


def oddities(path: Path | Member, channels: int = 3) -> tuple[str, ...]:
    """decode.oddities. Raises BadImage."""
    if isinstance(path, Path):
        return decode.oddities(path, channels)
    content = _content(path)
    with decode.named(path):
        image = decode.open_content(content)
        odd = [] if not isinstance(image, Image.Image) else decode.oddities_in(image, is_as_it_lies=channels not in (1, 3))
        decode.in_channels(image, channels)
        return tuple(odd)


def _content(path: Path | Member) -> bytes:
    if isinstance(path, Path):
        return decode.content_of(path)
    with decode.named(path):
        return path.read_bytes()
