"""Images to ask a model about: files and folders as they lie, with or without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.base.commands import command
from trainer.base.errors import DataError, did_you_mean
from trainer.data.datasets.builtin import ImageSet
from trainer.data.datasets.members import read_image
from trainer.data.decode import BadImage, evaluation_square, stack_squares
from trainer.data.image_folder import EXTENSIONS, is_image_folder
from trainer.data.transforms import fill_of
from trainer.data.workers import Watch, items_of
from trainer.inference.classifier import ImageFacts


class Pictures(Protocol):
    """Images that can be looked at, by their places."""

    def name(self, place: int) -> str:
        """What a reader finds an image by."""

    def picture(self, place: int) -> Image.Image | None:
        """None for what is no picture, or cannot be read any more."""


@dataclass(frozen=True)
class LabelledImages:
    """paths: of files below the folder. labels: [N] int64, the model's number of each one's
    class.
    """

    folder: Path
    paths: tuple[Path, ...]
    labels: np.ndarray

    def name(self, place: int) -> str:
        """The path of the image at a place, as seen from the folder."""
        return seen_from(self.folder, self.paths[place])

    def picture(self, place: int) -> Image.Image | None:
        """The image at a place in RGB; None where it cannot be shown."""
        return picture_of(partial(read_image, self.paths[place]))


@dataclass(frozen=True)
class SetPictures:
    """The images of an opened data set's split."""

    image_set: ImageSet

    def name(self, place: int) -> str:
        """The path of the image at a place, as seen from the data set's folder; its number where it
        has none.
        """
        index = getattr(self.image_set, "index", None)  # of a set of files
        return f"image {place}" if index is None else seen_from(index.root, index.path(place))

    def picture(self, place: int) -> Image.Image | None:
        """The image at a place in RGB; None where it cannot be shown."""
        return picture_of(partial(self.image_set.read, place))


def seen_from(folder: Path, named: object) -> str:
    """A file's path, or a line that begins with it, without the folder that the file is in: whoever
    gets a page has the images elsewhere, and where they were here is nothing to hand on.
    """
    return str(named).removeprefix(f"{folder}{os.sep}")


def picture_of(read: Callable[[], Any]) -> Image.Image | None:
    """What read gives, in RGB; None for what has other channels, or cannot be read any more."""
    try:
        image = read()
    except BadImage:
        return None
    return image.convert("RGB") if isinstance(image, Image.Image) else None


def find_images(given: Path) -> tuple[Path, ...]:
    """A file, or all image files below a folder, in the order of their names.

    Raises DataError where there is none.
    """
    if given.is_file():
        return (given,)
    if not given.is_dir():
        raise DataError(f"{given}: no such file or folder", "use images=<a file or a folder>")
    found = tuple(sorted(_below(given)))
    if not found:
        raise DataError(f"{given}: no images in it", f"their names end in {', '.join(EXTENSIONS)}")
    return found


def find_labelled(folder: Path, classes: Sequence[str], num_classes: int) -> LabelledImages:
    """The images of a folder of class folders, numbered as a model's logits are.

    A class folder is found by the model's name of the class, as in ImageNet-A, -R and -Sketch,
    whose folders are some of ImageNet's, or by its number, as in ImageNet-V2; folders of other
    names stand for the classes in the order of their names, if there are as many.

    Raises DataError where folders and classes do not fit together.
    """
    if folder.is_dir() and is_image_folder(folder):
        raise DataError(f"{folder}: holds train/ and val/", f"use data={folder / 'val'}")
    names = sorted(each.name for each in _subfolders(folder))
    if not names:
        asks = command("predict", images=folder)
        raise DataError(
            f"{folder}: no class folders in it",
            f"use data=<folder>/val or the like; images without labels: {asks} run=<a run>",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    if not set(names) <= numbers.keys():
        if all(name.isdecimal() and int(name) < num_classes for name in names):
            numbers = {name: int(name) for name in names}
        elif len(names) == num_classes and not (set(names) & numbers.keys()):
            numbers = {name: number for number, name in enumerate(names)}
        else:
            other = next(name for name in names if name not in numbers)
            raise DataError(
                f"{folder / other}: none of the model's {num_classes} classes is named"
                f" {other!r}{did_you_mean(other, classes)}",
                "name the class folders as the model's classes, or by their numbers",
            )
    paths, labels = [], []
    for name in names:
        found = sorted(_below(folder / name))
        paths += found
        labels += [numbers[name]] * len(found)
    if not paths:
        raise DataError(f"{folder}: no images in its class folders", "use data=<another folder>")
    return LabelledImages(folder, tuple(paths), np.array(labels, np.int64))


@dataclass(frozen=True)
class ImageBatches:
    """Batches by number, each (places of the images that could be read [n] int64, those images
    [n, C, px, px] uint8, and of each other one its place and what is wrong with it).
    """

    paths: tuple[Path, ...]
    image: ImageFacts
    batch_images: int

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        first = number * self.batch_images
        places, squares, errors = [], [], []
        for place in range(first, min(first + self.batch_images, len(self.paths))):
            try:
                squares.append(self._square(self.paths[place]))
                places.append(place)
            except BadImage as error:
                errors.append((place, str(error)))
        px, channels = self.image.test_px, self.image.channels
        if not squares:
            images = torch.empty(0, channels, px, px, dtype=torch.uint8)
        else:
            pixels = torch.from_numpy(stack_squares(squares, px)).permute(0, 3, 1, 2)
            images = pixels.expand(-1, channels, -1, -1).contiguous()
        return torch.tensor(places, dtype=torch.int64), images, errors

    def _square(self, path: Path) -> bytes:
        image, facts = read_image(path, self.image.channels), self.image
        return evaluation_square(
            image, facts.test_px, facts.crop_share, facts.interpolation, facts.crop_mode,
            fill_of(facts),
        )  # fmt: skip


def labelled_batches(
    images: LabelledImages, image: ImageFacts, batch_images: int, num_workers: int, watch: Watch
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, C, px, px] uint8, labels [B] int64) of all, in order.

    Raises BadImage for the first that cannot be read: a score over fewer is another score.
    """
    for places, pixels, errors in batches_of(images.paths, image, batch_images, num_workers, watch):
        for place, error in errors:
            path = str(images.paths[place])
            raise BadImage(error.removeprefix(f"{path}: "), place=path)
        yield pixels, torch.from_numpy(images.labels[places.numpy()])


def batches_of(
    paths: Sequence[Path], image: ImageFacts, batch_images: int, num_workers: int, watch: Watch
) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, str]]]]:
    """ImageBatches in order, made by loader processes. Raises what watch.check raises."""
    stream = ImageBatches(tuple(paths), image, batch_images)
    return items_of(stream, range(len(stream)), num_workers, "cpu", watch)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", "use data=<a folder of class folders>")
    return [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")]


def _below(folder: Path) -> Iterator[Path]:
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(inside) / name
