"""JPEG files to measure on, where no data set is given: photos of an ImageNet image's size, cut
from two sample photos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from trainer.data.datasets import shards

_SIZE = (500, 375)  # the commonest size of ImageNet's photos, in px
_QUALITY = 92
_ENDINGS = (".jpg", ".jpeg")


def photos(folder: Path, num_files: int) -> list[Path]:
    """So many JPEG files in a folder, no two alike."""
    sources = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(num_files):
        source = sources[number % 2]
        left, top = (
            random.integers(0, source.width - _SIZE[0]),
            random.integers(0, source.height - _SIZE[1]),
        )
        path = folder / f"{number:05}.jpg"
        source.crop((left, top, left + _SIZE[0], top + _SIZE[1])).save(path, quality=_QUALITY)
        files.append(path)
    return files


def photo_files(src: Path | None, folder: Path, num_photos: int = 64) -> list[Path]:
    """The JPEG files of a folder, or of a tar, written out into `folder`; without either, photos
    made there.

    Raises DataError for a tar that is damaged.
    """
    if src is None:
        return photos(folder, num_photos)
    return _written_out(src, folder) if src.is_file() else jpegs(src)


def jpegs(src: Path) -> list[Path]:
    """The JPEG files of a folder, in the order of their paths."""
    return sorted(path for path in src.rglob("*") if path.suffix.lower() in _ENDINGS)


def _written_out(tar: Path, folder: Path) -> list[Path]:
    """By number: a member's name opens no file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, content in shards.contents(tar):
        if name.lower().endswith(_ENDINGS):
            files.append(folder / f"{len(files):06}.jpg")
            files[-1].write_bytes(content)
    return files


def image_folder(
    root: Path, files: list[Path], num_train: int, num_val: int, num_classes: int = 2
) -> Path:
    """An image folder whose files are links to these, over and over, and their classes too."""
    for split, num_images in (("train", num_train), ("val", num_val)):
        for number in range(num_images):
            link = root / split / f"{number % num_classes:04}" / f"{number:06}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[number % len(files)].resolve())
    return root
