"""Folders of images whose targets are no class folders: what a task reads masks, boxes or tables
from. Subclasses of Layout register themselves, in the file of their task or in a plugin.
"""

from __future__ import annotations

import importlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from trainer.base.errors import DataError
from trainer.components.task import TaskSection
from trainer.data.decode import Planes, Readable
from trainer.recipe.profiles import IMAGENET_MEAN, IMAGENET_STD, Profile

_LONGEST_NAME_BYTES = 100  # of a folder, in the names of its runs


class TargetSet(ABC):
    """One split of images with targets of a task's own; it has the properties of an ImageSet too.

    labels: [N] int32, what images are told apart by where they are split evenly; all zero where
    nothing tells them apart. fingerprint: sha256 (hex) over names and sizes of all files. stand_in:
    the name of the split that is taken for validation, where none is called so; else empty.
    """

    num_images: int
    num_channels: int
    classes: tuple[str, ...]
    fingerprint: str
    stand_in: str
    is_in_memory = False

    @property
    def labels(self) -> np.ndarray:
        """[N] int32, all 0: an image of such a set has no one class."""
        return np.zeros(self.num_images, np.int32)

    @abstractmethod
    def path(self, i: int) -> Readable:
        """The file of image i."""

    @abstractmethod
    def read(self, i: int) -> Image.Image | Planes:
        """Image i. Raises BadImage."""

    @abstractmethod
    def read_target(self, i: int) -> Any:
        """The target of image i as it is before it is moved. Raises BadImage, naming its file."""

    @abstractmethod
    def files(self) -> Sequence[Readable]:
        """All files of images and targets, in order: what the digest of the content is of."""

    @abstractmethod
    def look_at_target(self, i: int, image: Image.Image | Planes) -> tuple[np.ndarray, tuple]:
        """For check-data: (how often each class occurs in image i [K], what is unusual about its
        target in words). Raises BadImage.
        """


class Layout(ABC):
    """One way in which a folder holds images with targets. Defining a subclass with a `name`
    registers it.

    task: the name of the task that reads it.
    """

    name: ClassVar[str]
    task: ClassVar[str]

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            _LAYOUTS[cls.name] = cls()

    @abstractmethod
    def holds(self, root: Path) -> bool:
        """Is a folder of this layout? A few look-ups, no error."""

    @abstractmethod
    def find(self, root: Path, split: str, num_channels: int) -> TargetSet:
        """The set of a split, "train" or "val". Raises DataError for what is missing."""

    def profile(self, root: Path) -> Profile:
        """The counts of a folder, with ImageNet's mean and deviation. Raises DataError."""
        train, val = (self.find(root, split, 3) for split in ("train", "val"))
        return Profile(
            name=profile_name(root),
            num_classes=len(train.classes),
            num_train=train.num_images,
            num_val=val.num_images,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            task=self.task,
        )

    def open_set(self, profile: Profile, root: Path, split: str) -> TargetSet:
        """A split, if it is as the profile says. Raises DataError."""
        found = self.find(root, split, profile.channels)
        expected = profile.num_train if split == "train" else profile.num_val
        if (found.num_images, len(found.classes)) != (expected, profile.num_classes):
            raise DataError(
                f"{root}: {found.num_images} {split} images of {len(found.classes)} classes, where"
                f" the profile {profile.name} has {expected} of {profile.num_classes}",
                f"use data={root} for a profile with the folder's own counts",
            )
        return found


_LAYOUTS: dict[str, Layout] = {}


def profile_name(root: Path) -> str:
    """What a folder's profile is called."""
    name = re.sub(r"[^\w.+-]+", "-", root.resolve().name).encode()[:_LONGEST_NAME_BYTES]
    return name.decode(errors="ignore") or "root"


def layout_of(root: Path | str | None, task: str | None = None) -> Layout | None:
    """The layout of a folder, of several that of a task, as VOC's has boxes and masks; None where
    it is of none, such as one of class folders.
    """
    if root is None or not os.path.isdir(root):
        return None
    if TaskSection.defined_in:
        importlib.import_module(TaskSection.defined_in)  # above: tasks define the layouts
    found = [one for one in _LAYOUTS.values() if one.holds(Path(root))]
    of_task = [one for one in found if one.task == task]
    return next(iter(of_task + found), None)
