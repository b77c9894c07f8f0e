"""Images with masks in a folder, and masks moved as their images were."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.base.errors import DataError
from trainer.base.names import plain_text
from trainer.components.task import Moved
from trainer.data.datasets.layouts import Layout, TargetSet
from trainer.data.decode import BadImage, Planes, content_of, named, open_content, read_image
from trainer.data.decode import whole_image as resized
from trainer.data.evaluation import never_skipped
from trainer.data.image_folder import EXTENSIONS, FOLDERS, STAND_INS

IGNORED = 255  # of a mask's pixels: neither trained on nor scored
CLASSES_FILE = "classes.txt"
_UNKNOWN = -1
_MODES = ("L", "P", "1")  # one channel of labels; of a palette its numbers
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


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
        for path in self.files():
            name = os.fsencode(path.relative_to(self.root))
            digest.update(name + b"\0%d\0" % (path.stat().st_size if path.is_file() else 0))
        return digest.hexdigest()

    def path(self, i: int) -> Path:
        return self.root / self.images[i]

    def mask_path(self, i: int) -> Path:
        """The file of mask i."""
        return self.root / self.masks[i]

    def files(self) -> Sequence[Path]:
        return [self.root / name for name in (*self.images, *self.masks)]

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


def read_labels(path: Path) -> np.ndarray:
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


# ---- where they lie


class MaskFolders(Layout):
    """images/<split>/… and masks/<split>/…, or <split>/images/… and <split>/masks/…, of the same
    names but for their endings; classes.txt beside them.
    """

    name: ClassVar[str] = "masks"
    task: ClassVar[str] = "segmentation"

    def holds(self, root: Path) -> bool:
        return _split_folders(root, FOLDERS["train"]) is not None

    def find(self, root: Path, split: str, num_channels: int) -> MaskedSet:
        names = (*FOLDERS[split], *(STAND_INS if split == "val" else ()))
        folders = _split_folders(root, names)
        if folders is None:
            raise DataError(
                f"{root}: has no images and masks of {split}",
                f"use images/{split}/ and masks/{split}/, or {split}/images/ and {split}/masks/",
            )
        images, masks = (_by_stem(folder) for folder in folders)
        if not images:
            raise DataError(f"{folders[0]}: no images in it", f"they end in {list(EXTENSIONS)}")
        missing = [images[stem] for stem in images if stem not in masks]
        if missing:
            more = f", nor of {len(missing) - 1} more" * (len(missing) > 1)
            raise DataError(
                f"{missing[0]}: no mask of this name in {folders[1]}{more}",
                "add it, or take the image away",
            )
        classes, table = read_classes(root / CLASSES_FILE)
        photos, drawn = (
            tuple(str(found[stem].relative_to(root)) for stem in sorted(images))
            for found in (images, masks)
        )
        found = next(name for name in names if name in folders[0].parts[-2:])
        stand_in = found if found in STAND_INS else ""
        return MaskedSet(root, photos, drawn, classes, table, num_channels, stand_in)


class VocFolders(Layout):
    """Pascal VOC's: JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt. Its own
    21 classes, unless there is a classes.txt.
    """

    name: ClassVar[str] = "voc"
    task: ClassVar[str] = "segmentation"

    def holds(self, root: Path) -> bool:
        return (root / "SegmentationClass").is_dir() and (root / "JPEGImages").is_dir()

    def find(self, root: Path, split: str, num_channels: int) -> MaskedSet:
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        try:
            names = path.read_text().split()
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{path}: cannot be read", "it lists the images of a split") from None
        images = tuple(f"JPEGImages/{name}.jpg" for name in names)
        masks = tuple(f"SegmentationClass/{name}.png" for name in names)
        missing = [name for name in (*images, *masks) if not (root / name).is_file()]
        if missing or not names:
            what = f"{root / missing[0]}: not found" if missing else f"{path}: lists no image"
            raise DataError(what, f"{path} has to list images that are there, with their masks")
        own = root / CLASSES_FILE
        classes, table = read_classes(own) if own.exists() else _table_of(own, list(_VOC))
        return MaskedSet(root, images, masks, classes, table, num_channels)


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
    return _table_of(path, [line.strip() for line in lines if line.strip()])


def _table_of(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
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


def _split_folders(root: Path, names: Sequence[str]) -> tuple[Path, Path] | None:
    """The folders of images and masks of the first split that is there."""
    for name in names:
        for images, masks in (
            (root / "images" / name, root / "masks" / name),
            (root / name / "images", root / name / "masks"),
        ):
            if images.is_dir() and masks.is_dir():
                return images, masks
    return None


def _by_stem(folder: Path) -> dict[str, Path]:
    """The image files below a folder, by their names without endings. Raises DataError."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        is_image = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        if not is_image or not path.is_file():
            continue
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise DataError(f"{path}: {found[stem].name} has the same name", "keep one of them")
        found[stem] = path
    return found
