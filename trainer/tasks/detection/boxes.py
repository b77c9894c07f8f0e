"""A split of images with boxes, and where boxes go when their images are cut, resized and
mirrored.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.base.errors import DataError
from trainer.components.letterbox import whole_box
from trainer.components.task import Moved
from trainer.data.datasets.layouts import Layout, TargetSet
from trainer.data.datasets.members import content_of, read_image
from trainer.data.decode import (
    RESAMPLING,
    BadImage,
    Planes,
    named,
    open_content,
    train_square,
)
from trainer.data.evaluation import never_skipped
from trainer.data.image_folder import STAND_INS
from trainer.tasks.detection import coco, voc
from trainer.tasks.detection.annotations import Annotations, Fault

LEAST_SIDE_PX = 1.0  # of what is left of a box in a training image; less is no thing to be found
_MOST_NAMED = 3


class Boxes(NamedTuple):
    """Of one image. sides: [n, 4] float32, (left, top, right, bottom) in px. labels: [n] int64.
    is_crowd: [n] bool, see Annotations.
    """

    sides: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray


@dataclass(frozen=True)
class BoxSet(TargetSet):
    """One split. An image with an unusable annotation is a bad image: `bad_images=skip` leaves it
    out of training.
    """

    annotations: Annotations
    num_channels: int = 3

    @property
    def num_images(self) -> int:  # type: ignore[override]
        """Images of the split, those without a box too."""
        return len(self.annotations.names)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """The classes' names, in the order of their labels."""
        return self.annotations.classes

    @property
    def stand_in(self) -> str:  # type: ignore[override]
        """The split that is taken for validation, where none is called so; else empty."""
        file = self.annotations.file
        return next((name for name in STAND_INS if name in (file.stem, file.parent.name)), "")

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """sha256 (hex) over names, classes and boxes, and the channels where they are not three."""
        found = self.annotations
        digest = hashlib.sha256(repr((found.classes, found.names)).encode())
        for values in (found.sizes, found.boxes, found.labels, found.is_crowd, found.ends):
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        digest.update(repr(found.faults).encode())
        if self.num_channels != 3:
            digest.update(str(self.num_channels).encode())
        return digest.hexdigest()

    @cached_property
    def _faults(self) -> dict[int, list[Fault]]:
        by_image = defaultdict(list)
        for fault in self.annotations.faults:
            if fault.image is not None:
                by_image[fault.image].append(fault)
        return dict(by_image)

    def path(self, i: int) -> Path:
        return self.annotations.folder / self.annotations.names[i]

    def read(self, i: int) -> Image.Image | Planes:
        """Image i. Raises BadImage, also for annotations that cannot be used."""
        self._boxes(i)
        image = read_image(self.path(i), self.num_channels)
        self._check_size(i, image.size)
        return image

    def read_target(self, i: int) -> Boxes:
        """The boxes of image i. Raises BadImage, also where the image has another size than they
        were made for.
        """
        boxes, path = self._boxes(i), self.path(i)
        with named(path):
            image = open_content(content_of(path))
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        self._check_size(i, size)
        return boxes

    def _boxes(self, i: int) -> Boxes:
        faults = self._faults.get(i, [])
        if faults:
            listed = "; ".join(map(str, faults[:_MOST_NAMED]))
            rest = len(faults) - _MOST_NAMED
            more = f"; and {rest} more" if rest > 0 else ""
            raise BadImage(
                f"unusable in {self.annotations.file.name}: {listed}{more}",
                "mend or remove them",
                place=str(self.path(i)),
            )
        found = self.annotations
        own = slice(found.ends[i], found.ends[i + 1])
        return Boxes(found.boxes[own], found.labels[own], found.is_crowd[own])

    def files(self) -> Sequence[Path]:
        return [self.annotations.file, *map(self.path, range(self.num_images))]

    def look_at_target(self, i: int, image: Image.Image | Planes) -> tuple[np.ndarray, tuple]:
        self._check_size(i, image.size)
        boxes = self._boxes(i)
        odd = [] if len(boxes.labels) else ["no box"]
        odd += ["crowds or difficult boxes"] if boxes.is_crowd.any() else []
        return np.bincount(boxes.labels, minlength=len(self.classes)), tuple(odd)

    def _check_size(self, i: int, size: Sequence[int]) -> None:
        wanted, found = self.annotations.sizes[i].tolist(), list(size)
        if found != wanted:
            raise BadImage(
                f"{found[0]} x {found[1]} px, where {self.annotations.file.name} says"
                f" {wanted[0]} x {wanted[1]}: boxes would lie elsewhere",
                "use the images that were annotated",
                place=str(self.path(i)),
            )


def moved_boxes(boxes: Boxes, part: Sequence[int], is_flipped: bool, image_px: int) -> Boxes:
    """The boxes of an image whose part (top, left, height, width) was resized to image_px squared,
    then mirrored or not: cut off at its edges; those of which less than LEAST_SIDE_PX is left are
    gone.
    """
    top, left, height, width = part
    across, down = image_px / width, image_px / height
    sides = (boxes.sides.astype(np.float64) - [left, top, left, top]) * [across, down, across, down]
    sides = np.clip(sides, 0, image_px)
    if is_flipped:
        sides = np.stack(
            [image_px - sides[:, 2], sides[:, 1], image_px - sides[:, 0], sides[:, 3]], axis=1
        )
    is_left = (sides[:, 2:] - sides[:, :2] >= LEAST_SIDE_PX).all(axis=1)
    return Boxes(sides[is_left].astype(np.float32), boxes.labels[is_left], boxes.is_crowd[is_left])


def training_targets(images: BoxSet, places: np.ndarray, moved: Moved) -> np.ndarray:
    """Boxes and classes of a micro-batch of a BoxSet, or of a part of one: [b, most, 5] float32,
    (left, top, right, bottom) in px and the class, rows without a box -1. most: of these images, at
    least 1. Crowds are left out. Raises BadImage.
    """
    rows = zip(places.tolist(), moved.boxes, moved.is_flipped.tolist(), strict=True)
    found = []
    for place, part, is_flipped in rows:
        boxes = moved_boxes(images.read_target(place), part, is_flipped, moved.image_px)
        kept = ~boxes.is_crowd
        found.append(np.concatenate([boxes.sides[kept], boxes.labels[kept, None]], axis=1))
    return padded(found, 5)


def padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Arrays [n, width] of unlike lengths as one [b, most, width] float32, -1 where there is
    nothing; most is at least 1.
    """
    most = max(1, max(map(len, rows), default=1))
    made = np.full((len(rows), most, width), -1, np.float32)
    for place, own in enumerate(rows):
        made[place, : len(own)] = own
    return made


@dataclass(frozen=True)
class BoxEvaluation:
    """The evaluation batches of a BoxSet by number, each image whole in a square of test_px, padded
    at the right and below.

    Targets: [B, 1 + most, 6] float32. First of each (the image's number, its width and height in
    px, the px of it that are one px of the square, 0, 0); then its boxes (left, top, right, bottom)
    in px of the image, class, 1 for a crowd; rows without a box are -1.
    """

    image_set: BoxSet
    test_px: int
    interpolation: str
    batch_images: int

    def __len__(self) -> int:
        return -(-self.image_set.num_images // self.batch_images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | BadImage:
        first = number * self.batch_images
        places = range(first, min(first + self.batch_images, self.image_set.num_images))
        px, channels = self.test_px, self.image_set.num_channels
        images, targets = np.empty((len(places), channels, px, px), np.uint8), []
        try:
            for row, place in enumerate(places):
                image = self.image_set.read(place)
                images[row] = whole_square(image, px, self.interpolation)
                targets.append(_evaluated(place, image.size, px, self.image_set.read_target(place)))
        except BadImage as error:
            return never_skipped(error)
        return torch.from_numpy(images), torch.from_numpy(padded(targets, 6))


def whole_square(image: Image.Image | Planes, image_px: int, interpolation: str) -> np.ndarray:
    """A whole image in a square: [C or 1, image_px, image_px] uint8, padded at the right and below
    as `letterbox` does it.
    """
    box = whole_box(image.height, image.width)
    return train_square(image, box, RESAMPLING[interpolation], image_px)


def _evaluated(place: int, size: tuple[int, int], image_px: int, boxes: Boxes) -> np.ndarray:
    about = [[place, *size, max(size) / image_px, 0, 0]]
    rows = np.concatenate([boxes.sides, boxes.labels[:, None], boxes.is_crowd[:, None]], axis=1)
    return np.concatenate([about, rows])


class CocoLayout(Layout):
    """A JSON of boxes for each split, beside the images or in annotations/. See coco."""

    name, task = "coco", "detection"

    def holds(self, root: Path) -> bool:
        return any(coco.annotation_files(root, "train"))

    def find(self, root: Path, split: str, num_channels: int) -> TargetSet:
        found = {each: coco.read_split(root, each) for each in ("train", split)}
        if found["train"].classes != found[split].classes:
            raise DataError(
                f"other categories than {found['train'].file.name}",
                "use the same in both, with the same ids",
                place=str(found[split].file),
            )
        return _box_set(found[split], num_channels)


class VocLayout(Layout):
    """VOC's JPEGImages/, Annotations/ and ImageSets/Main/. See voc."""

    name, task = "voc-boxes", "detection"

    def holds(self, root: Path) -> bool:
        return voc.list_file(root, "train") is not None

    def find(self, root: Path, split: str, num_channels: int) -> TargetSet:
        train = voc.read_split(root, "train")
        found = train if split == "train" else voc.read_split(root, split, train.classes)
        return _box_set(found, num_channels)


def _box_set(found: Annotations, num_channels: int) -> BoxSet:
    """Raises DataError for annotations of no image, and where there is not one box."""
    lost = [fault for fault in found.faults if fault.image is None]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(f"{lost[0]}{more}", "remove it, or add the image", place=str(found.file))
    if not len(found.boxes):
        raise DataError("has no usable box", "add at least one", place=str(found.file))
    return BoxSet(found, num_channels)
