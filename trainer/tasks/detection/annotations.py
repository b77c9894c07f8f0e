"""The boxes of one split as flat arrays, and what is wrong with those that are left out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MOST_OUTSIDE_PX = 1.0  # beyond its image, by rounding: cut off at the edge


@dataclass(frozen=True)
class Fault:
    """One annotation that cannot be used, for people. image: its number, None where it is of no
    image.
    """

    image: int | None
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}"


@dataclass(frozen=True)
class Annotations:
    """The sound boxes of a split, image by image.

    file: what they were read from. folder: of the images. names: of each image below it. sizes:
    [N, 2] int64, width and height in px. boxes: [M, 4] float32, (left, top, right, bottom) in px of
    the image, within it. labels: [M] int64, places in `classes`. is_crowd: [M] bool, one box around
    many things, or a thing too hard to be asked for: not trained on, and what is found there is
    neither right nor wrong. ends: [N + 1], image i has the boxes ends[i] to ends[i + 1]. faults: of
    the boxes that are left out.
    """

    file: Path
    folder: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    is_crowd: np.ndarray
    ends: np.ndarray
    faults: tuple[Fault, ...] = ()


@dataclass
class Gathered:
    """What a reader has found so far; `annotations` checks it. Boxes may come in any order."""

    file: Path
    classes: tuple[str, ...]
    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _boxes: array = field(default_factory=lambda: array("d"))
    _labels: array = field(default_factory=lambda: array("q"))
    _images: array = field(default_factory=lambda: array("q"))
    _is_crowd: array = field(default_factory=lambda: array("b"))
    _wheres: list[str] = field(default_factory=list)

    def add_image(self, name: str, width: int, height: int) -> int:
        """Add an image; its number."""
        self.names.append(name)
        self.sizes.append((width, height))
        return len(self.names) - 1

    def add_fault(self, image: int | None, where: str, found: str) -> None:
        """Add an annotation that cannot even be checked."""
        self.faults.append(Fault(image, where, found))

    def add_box(
        self, image: int, where: str, box: Sequence[float], label: int, is_crowd: bool
    ) -> None:
        """Add a box (left, top, right, bottom) in px, sound or not."""
        self._boxes.extend(box)
        self._labels.append(label)
        self._images.append(image)
        self._is_crowd.append(is_crowd)
        self._wheres.append(where)

    def annotations(self, folder: Path) -> Annotations:
        """The sound boxes, image by image in the order they came; the others are faults."""
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        images = np.array(self._images, np.int64)
        sizes = np.array(self.sizes, np.int64).reshape(-1, 2)
        is_sound, faults = np.ones(len(boxes), bool), list(self.faults)
        for kind, is_bad in faults_of(boxes, sizes[images]).items():
            for i in np.flatnonzero(is_bad & is_sound).tolist():
                shown = " ".join(f"{side:g}" for side in boxes[i])
                width, height = sizes[images[i]].tolist()
                found = f"{kind} (left top right bottom {shown} in {width} x {height} px)"
                faults.append(Fault(int(images[i]), self._wheres[i], found))
            is_sound &= ~is_bad
        order = np.argsort(images[is_sound], kind="stable")
        most = sizes[images][:, [0, 1, 0, 1]]
        cut = np.clip(np.nan_to_num(boxes), 0, most)
        counts = np.bincount(images[is_sound], minlength=len(self.names))
        return Annotations(
            self.file,
            folder,
            self.classes,
            tuple(self.names),
            sizes,
            cut[is_sound][order].astype(np.float32),
            np.array(self._labels, np.int64)[is_sound][order],
            np.array(self._is_crowd, bool)[is_sound][order],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            tuple(faults),
        )


def faults_of(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Which of the boxes [M, 4] float64 in images of sizes [M, 2] have which fault, [M] bool each.

    A box that reaches at most MOST_OUTSIDE_PX out of its image has none, if some of it is inside.
    """
    left, top, right, bottom = boxes.T
    width, height = sizes.T
    with np.errstate(invalid="ignore"):
        outside = np.max([-left, -top, right - width, bottom - height], axis=0) > MOST_OUTSIDE_PX
        has_part = (np.minimum(right, width) > np.maximum(left, 0)) & (
            np.minimum(bottom, height) > np.maximum(top, 0)
        )
        return {
            "box not of finite numbers": ~np.isfinite(boxes).all(axis=1),
            "box reversed": (right < left) | (bottom < top),
            "box of no size": (right == left) | (bottom == top),
            "box outside its image": outside | ~has_part,
        }
