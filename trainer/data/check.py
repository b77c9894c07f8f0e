"""Decoding a whole dataset to find bad and unusual images before a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text

from trainer.base.terminal import readable
from trainer.data.datasets.builtin import FolderSet, ImageSet
from trainer.data.datasets.layouts import TargetSet
from trainer.data.datasets.members import check_header, inspected
from trainer.data.decode import EXIF_ROTATED, BadImage, DataTrouble, Planes
from trainer.data.duplicates import Looks, empty_looks, look_of, same_files, similar_pictures
from trainer.data.evaluation import never_skipped
from trainer.data.jpeg import DAMAGED

_IMAGES_AT_ONCE = 4096  # one future each: bounds the memory
_HEADERS_AT_ONCE = 1024
_NUM_NAMED = 20


class Pixels(NamedTuple):
    """Of each image, zeros where it does not decode. moments: [N, 2, C], the means of its pixels
    and of their squares, where black is 0 and white is 1. sizes: [N, 2], width and height in px.
    """

    moments: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class DataReport:
    """What one split holds.

    bad: one line per image that does not decode, or cannot be read. odd: unusual kinds with the
    paths of such images, which decode. class_counts: images per class. looks: what they are
    compared by, of another split; None for a set in memory or a .beton. path: of an image by its
    number. pixels: what a data profile is made of; None as looks are.
    """

    num_images: int
    bad: tuple[str, ...]
    odd: dict[str, tuple[str, ...]]
    class_counts: dict[str, int]
    looks: Looks | None = None
    path: Callable[[int], object] = str
    pixels: Pixels | None = None

    @property
    def is_sound(self) -> bool:
        """Do all images decode, none of them only in part?"""
        return not self.bad and DAMAGED not in self.odd


def check_data(image_set: ImageSet, num_threads: int = 1) -> DataReport:
    """Decode every image of one split. Decoders release the GIL, so threads share the work."""
    counts = np.bincount(image_set.labels, minlength=len(image_set.classes))
    if image_set.is_in_memory:
        return DataReport(image_set.num_images, (), {}, _by_class(image_set, counts))
    bad, odd, looks, pixels, in_targets = _check_images(image_set, num_threads)
    path = _path_of(image_set)
    if path is None:
        return DataReport(image_set.num_images, bad, odd, _by_class(image_set, counts))
    class_counts = _by_class(image_set, counts if in_targets is None else in_targets)
    return DataReport(image_set.num_images, bad, odd, class_counts, looks, path, pixels)


def _by_class(image_set: ImageSet, counts: np.ndarray) -> dict[str, int]:
    return dict(zip(image_set.classes, counts.tolist(), strict=True))


def _path_of(image_set: ImageSet) -> Callable[[int], Any] | None:
    """What gives the file of an image by its number; None where images have no files."""
    if isinstance(image_set, TargetSet):
        return image_set.path
    return image_set.index.path if isinstance(image_set, FolderSet) else None


def _check_images(
    image_set: ImageSet, num_threads: int
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], Looks, Pixels, np.ndarray | None]:
    """What is bad and odd, what images are compared by, their pixels and, of targets that are not
    a class each, in how many images each class is [K].
    """
    bad: list[str] = []
    in_targets = None
    odd: dict[str, list[str]] = {}
    num_images = image_set.num_images
    looks = empty_looks(num_images)
    pixels = Pixels(
        np.zeros((num_images, 2, image_set.num_channels), np.float32),
        np.zeros((num_images, 2), np.int32),
    )
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, num_images, _IMAGES_AT_ONCE):
            places = range(start, min(start + _IMAGES_AT_ONCE, num_images))
            for i, found in zip(places, pool.map(partial(_look, image_set), places), strict=True):
                if isinstance(found, BadImage):
                    bad.append(str(found))
                    continue
                if found is None:
                    continue
                kinds, (digest, looks.hashes[i], looks.is_flat[i]), image, classes = found
                if classes is not None:
                    in_targets = (0 if in_targets is None else in_targets) + (classes > 0)
                looks.digests[i] = np.frombuffer(digest, np.uint8)
                pixels.moments[i], pixels.sizes[i] = image
                path = _path_of(image_set)
                for kind in kinds if path else ():
                    odd.setdefault(kind, []).append(str(path(i)))
    listed = {kind: tuple(paths) for kind, paths in sorted(odd.items())}
    return tuple(bad), listed, looks, pixels, in_targets


def duplicates(train: DataReport, val: DataReport) -> dict[str, tuple[str, ...]]:
    """The val images that are in train too, `<val> = <train>` each, by how they are the same."""
    if train.looks is None or val.looks is None:
        return {}
    same = same_files(val.looks, train.looks)
    near = set(similar_pictures(val.looks, train.looks)) - set(same)
    known = {i for i, _ in same}
    pairs = {
        "the same file in train": same,
        "nearly the same picture in train": sorted(pair for pair in near if pair[0] not in known),
    }
    return {
        kind: tuple(f"{val.path(i)} = {train.path(j)}" for i, j in found)
        for kind, found in pairs.items()
        if found
    }


def check_headers(image_set: ImageSet, num_threads: int = 1) -> Iterator[None]:
    """Open every file of a validation split, without decoding it, before a run depends on it; gives
    None for each part.

    Raises BadImage for the first that does not open.
    """
    path = _path_of(image_set)
    if path is None:  # in memory, or with a checksum of its own
        return
    with ThreadPoolExecutor(num_threads) as pool:
        look = partial(_header, image_set, path)
        for start in range(0, image_set.num_images, _HEADERS_AT_ONCE):
            places = range(start, min(start + _HEADERS_AT_ONCE, image_set.num_images))
            for error in filter(None, pool.map(look, places)):
                raise never_skipped(error)
            yield None


def _header(image_set: ImageSet, path: Callable[[int], Any], i: int) -> BadImage | None:
    try:
        check_header(path(i), image_set.num_channels)
        if isinstance(image_set, TargetSet):
            image_set.read_target(i)
    except BadImage as error:
        return error
    return None


def _look(
    image_set: ImageSet, i: int
) -> tuple[tuple[str, ...], tuple, tuple, np.ndarray | None] | BadImage | None:
    """What is unusual about an image file, what it is compared by, of its pixels the moments and
    the size, and the classes in its target; nothing for a .beton, which stores its own bytes.
    """
    path = _path_of(image_set)
    try:
        if path is not None:
            odd, image, content = inspected(path(i), image_set.num_channels)
            counts = None
            if isinstance(image_set, TargetSet):
                counts, more = image_set.look_at_target(i, image)
                odd = (*odd, *more)
            return odd, look_of(content, image), (moments_of(image), image.size), counts
        image_set.read(i)
        return None
    except BadImage as error:
        return error
    except DataTrouble as error:  # the report is about all files, those without permission too
        return BadImage(str(error))


def moments_of(image: Image.Image | Planes) -> np.ndarray:
    """[2, C]: per channel the mean of an image's pixels and of their squares, in [0, 1]."""
    planes = image.planes if isinstance(image, Planes) else (image,)
    counts = np.concatenate([plane.histogram() for plane in planes]).reshape(-1, 256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.stack([shares @ levels, shares @ levels**2])


def report_table(report: DataReport, split: str) -> Table:
    """The report as a table: counts, and the first of the files concerned."""
    table = Table(
        "what", "images", "which", title=f"{split}: {report.num_images} images, {_spread(report)}"
    )
    for kind, paths in {"bad": report.bad, **report.odd}.items():
        table.add_row(kind, str(len(paths)), _named(paths))
    return table


def rotated_note(*reports: DataReport) -> str:
    """What a turned camera means for training; empty where no image has the mark of one."""
    paths = [path for report in reports for path in report.odd.get(EXIF_ROTATED, ())]
    if not paths:
        return ""
    files = "<files>"
    if any(os.path.islink(path) for path in paths):  # exiftran puts a file in a link's place
        files = "<the files that these links lead to>"
    return (
        f"{EXIF_ROTATED}: training and evaluation see these as they are stored, not turned as a"
        f" viewer shows them; turn the files themselves where up matters (exiftran -ai {files})"
    )


def duplicates_table(found: dict[str, tuple[str, ...]]) -> Table:
    """Duplicates as a table."""
    table = Table("what", "images", "which", title="val images that training sees")
    for kind, lines in found.items():
        table.add_row(kind, str(len(lines)), _named(lines))
    return table


def _spread(report: DataReport) -> str:
    counts = report.class_counts.values()
    return f"{len(counts)} classes of {min(counts)} to {max(counts)}"


def _named(lines: tuple[str, ...]) -> Text:
    """As Text, since rich would read a bracket in a path as markup."""
    rest = len(lines) - _NUM_NAMED
    return Text(
        readable("\n".join(lines[:_NUM_NAMED])) + (f"\n… and {rest} more" if rest > 0 else ""),
        overflow="fold",
    )
