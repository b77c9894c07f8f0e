"""Images with masks, and masks moved as their images were."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.base.errors import DataError
from trainer.base.names import plain_text
from trainer.components.task import Moved
from trainer.data.datasets.layouts import TargetSet
from trainer.data.datasets.members import content_of, read_image
from trainer.data.decode import BadImage, Planes, Readable, named, open_content
from trainer.data.decode import whole_image as resized
from trainer.data.evaluation import never_skipped

IGNORED = 255  # of a mask's pixels: neither trained on nor scored
CLASSES_FILE = "classes.txt"
_UNKNOWN = -1
_MODES = ("L", "P", "1")  # one channel of labels; of a palette its numbers


@dataclass(frozen=True)
class MaskedSet(TargetSet):
    """Images with a mask each: a file of one channel of 8 bits, whose pixels are labels.

    images, masks: names below root, in order. table: the class of each label [256], IGNORED for
    those that are not scored, _UNKNOWN for those that no class has.
    """

    root: Path
    images: tuple[str, ...]
    masks: tuple[str, ...]
    classes: tuple[str, ...]
    table: tuple[int, ...]
    num_channels: int = 3
    stand_in: str = ""

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """Images of the split, each with its mask."""
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 (hex) over the files' names and sizes, the classes and their labels."""
        digest = hashlib.sha256(repr((self.classes, self.table, self.num_channels)).encode())
        for name, size in zip((*self.images, *self.masks), self.file_sizes(), strict=True):
            digest.update(os.fsencode(name) + b"\0%d\0" % size)
        return digest.hexdigest()

    def file_sizes(self) -> Iterable[int]:
        """In bytes, of the images' files and then of the masks'; 0 where there is none."""
        paths = (self.root / name for name in (*self.images, *self.masks))
        return (path.stat().st_size if path.is_file() else 0 for path in paths)

    def path(self, i: int) -> Readable:
        return self.root / self.images[i]

    def mask_path(self, i: int) -> Readable:
        """The file of mask i."""
        return self.root / self.masks[i]

    def files(self) -> Sequence[Readable]:
        number = range(self.num_images)
        return [*map(self.path, number), *map(self.mask_path, number)]

    def read(self, i: int) -> Image.Image | Planes:
        return read_image(self.path(i), self.num_channels)

    def read_target(self, i: int) -> np.ndarray:
        """The mask of image i: [H, W] uint8, the class of each pixel or IGNORED.

        Raises BadImage for a mask of another size than its image, of several channels, or with a
        label that no class has.
        """
        path = self.path(i)
        with named(path):
            image = open_content(content_of(path))
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        return self._mask(i, size)

    def look_at_target(self, i: int, image: Image.Image | Planes) -> tuple[np.ndarray, tuple]:
        counts = np.bincount(self._mask(i, image.size).ravel(), minlength=256)
        counts = counts[: len(self.classes)]
        return counts, () if counts.any() else ("mask without a scored pixel",)

    def _mask(self, i: int, size: tuple[int, int]) -> np.ndarray:
        labels = read_labels(self.mask_path(i))
        place = str(self.mask_path(i))
        if labels.shape[::-1] != tuple(size):
            raise BadImage(
                f"a mask of {labels.shape[1]} x {labels.shape[0]} px for an image of {size[0]} x"
                f" {size[1]}",
                "make it as large as its image, by the nearest pixel",
                place=place,
            )
        mask = self._table[labels]
        if (mask == _UNKNOWN).any():
            found = ", ".join(map(str, np.unique(labels[mask == _UNKNOWN])[:5]))
            raise BadImage(
                f"label {found}, which none of the {len(self.classes)} classes has",
                f"add its name to {CLASSES_FILE}, with a ! before it where it is not scored;"
                f" {IGNORED} is never scored",
                place=place,
            )
        return mask.astype(np.uint8)

    @cached_property
    def _table(self) -> np.ndarray:
        return np.array(self.table, np.int16)


def read_labels(path: Readable) -> np.ndarray:
    """The labels of a mask's file: [H, W] uint8. Raises BadImage."""
    with named(path):
        image = open_content(content_of(path))
        mode = None if isinstance(image, np.ndarray) else image.mode
        labels = np.asarray(image) if mode in _MODES else None
    if labels is None:
        what = "an array" if mode is None else f"a mask of mode {mode}"
        if mode in ("RGB", "RGBA"):
            what = "a mask coded in colours"
        raise BadImage(
            f"{what}, where each pixel has one label of 8 bits",
            "write its labels into a PNG of one channel",
            place=str(path),
        )
    return labels.astype(np.uint8)


def moved_masks(images: MaskedSet, places: np.ndarray, moved: Moved) -> Tensor:
    """The masks of a micro-batch [b, px, px] uint8, moved as its images were; IGNORED outside of an
    image. Raises BadImage.
    """
    masks = [
        moved_mask(images.read_target(int(place)), box, is_flipped, moved.image_px)
        for place, box, is_flipped in zip(places, moved.boxes, moved.is_flipped, strict=True)
    ]
    return torch.from_numpy(np.stack(masks))


def moved_mask(mask: np.ndarray, box: np.ndarray, is_flipped: bool, image_px: int) -> np.ndarray:
    """The part of a mask [H, W] in a box, [px, px]: each pixel the one at its centre, as PIL's
    nearest has it, so that no label comes about that was not there.
    """
    top, left, height, width = box
    steps = (np.arange(image_px) + 0.5) / image_px
    rows, columns = (np.floor(start + steps * side).astype(np.int64) for start, side in
                     ((top, height), (left, width)))  # fmt: skip
    if is_flipped:
        columns = columns[::-1]
    are_rows, are_columns = (
        (places >= 0) & (places < side)
        for places, side in zip((rows, columns), mask.shape, strict=True)
    )
    found = np.full((image_px, image_px), IGNORED, np.uint8)
    found[np.ix_(are_rows, are_columns)] = mask[np.ix_(rows[are_rows], columns[are_columns])]
    return found


@dataclass(frozen=True)
class MaskedStream:
    """The batches of an evaluation, of one whole image each, with its mask at full size: (image
    [1, C, h, w], mask [1, H, W]), both uint8.

    short_px: the shorter side that images are resized to. One at a time, since sizes differ: a
    score depends on no batch.
    """

    images: MaskedSet
    short_px: int
    interpolation: str

    def __len__(self) -> int:
        return self.images.num_images

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | BadImage:
        try:
            image, mask = self.images.read(number), self.images.read_target(number)
        except BadImage as error:
            return never_skipped(error)
        pixels = input_of(image, self.short_px, self.interpolation)
        return pixels, torch.from_numpy(mask)[None]


def input_of(image: Image.Image | Planes, short_px: int, interpolation: str) -> Tensor:
    """A whole image at another size, [1, C, h, w] uint8."""
    pixels = resized(image, short_px, interpolation)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the scored classes, and the class of each label [256].

    One name a line, in the order of the labels 0, 1, ...; one with a ! before it is not scored.
    255 never is. Raises DataError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"{path}: cannot be read",
            "write the names of the classes into it, one a line, in the order of their labels from"
            " 0 on, with a ! before those that are not scored",
        ) from None
    return table_of(path, [line.strip() for line in lines if line.strip()])


def table_of(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """read_classes of names that a file would have. path: of the file, for messages."""
    scored = [name for name in names if not name.startswith("!")]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(scored) < 2 or len(names) > IGNORED or twice:
        found = f"{twice[0]!r} twice" if twice else f"{len(scored)} scored of {len(names)} names"
        raise DataError(f"{path}: {found}", f"use 2 to {IGNORED} different names")
    try:
        classes = tuple(map(plain_text, scored))
    except ValueError as error:
        raise DataError(f"{path}: {error}", "use printable names") from None
    labels = [IGNORED if name.startswith("!") else scored.index(name) for name in names]
    unknown = [_UNKNOWN] * (IGNORED - len(labels))
    return classes, (*labels, *unknown, IGNORED)
