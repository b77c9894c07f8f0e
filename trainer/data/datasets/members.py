"""Reading image files, single or packed: the same bytes give the same image either way."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trainer.data import decode, jpeg
from trainer.data.decode import Planes, Readable
from trainer.data.jpeg import Jpeg


def read_image(path: Readable, channels: int = 3) -> Image.Image | Planes:
    """decode.read_image. Raises BadImage."""
    return decode.decoded(path, content_of(path), channels)


def read_for_training(path: Readable, channels: int = 3) -> Image.Image | Planes | Jpeg:
    """jpeg.read_for_training. Raises BadImage."""
    return jpeg.taken_for_training(path, content_of(path), channels)


def inspected(
    path: Readable, channels: int = 3
) -> tuple[tuple[str, ...], Image.Image | Planes, bytes]:
    """What is unusual about an image, JPEG damage included; the image; its file's bytes. Raises
    BadImage.
    """
    content = content_of(path)
    odd, image = decode.inspected(path, content, channels)
    return (*odd, *([jpeg.DAMAGED] if jpeg.is_damaged(content) else ())), image, content


def check_header(path: Readable, channels: int = 3) -> None:
    """decode.check_header. Raises BadImage."""
    decode.check_header(path, content_of(path), channels)


def content_of(path: Readable) -> bytes:
    """The bytes of an image's file. Raises BadImage."""
    if isinstance(path, Path):
        return decode.content_of(path)
    with decode.named(path):
        return path.read_bytes()
