"""Decoding a whole dataset to find bad and unusual images before a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.table import Table
from rich.text import Text

from trainer.base.terminal import readable
from trainer.data.datasets.builtin import FolderSet, ImageSet
from trainer.data.datasets.members import oddities
from trainer.data.decode import BadImage, DataTrouble

_IMAGES_AT_ONCE = 4096  # one future each: bounds the memory
_NUM_NAMED = 20


@dataclass(frozen=True)
class DataReport:
    """What one split holds.

    bad: one line per image that does not decode, or cannot be read. odd: unusual kinds with the
    paths of such images, which decode. class_counts: images per class.
    """

    num_images: int
    bad: tuple[str, ...]
    odd: dict[str, tuple[str, ...]]
    class_counts: dict[str, int]

    @property
    def is_sound(self) -> bool:
        """Do all images decode, so that a run with bad_images=fail succeeds?"""
        return not self.bad


def check_data(image_set: ImageSet, num_threads: int = 1) -> DataReport:
    """Decode every image of one split. Decoders release the GIL, so threads share the work."""
    counts = np.bincount(image_set.labels, minlength=len(image_set.classes))
    bad, odd = ((), {}) if image_set.is_in_memory else _check_images(image_set, num_threads)
    class_counts = dict(zip(image_set.classes, counts.tolist(), strict=True))
    return DataReport(image_set.num_images, bad, odd, class_counts)


def _check_images(
    image_set: ImageSet, num_threads: int
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    bad: list[str] = []
    odd: dict[str, list[str]] = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, image_set.num_images, _IMAGES_AT_ONCE):
            places = range(start, min(start + _IMAGES_AT_ONCE, image_set.num_images))
            for i, found in zip(places, pool.map(partial(_look, image_set), places), strict=True):
                if isinstance(found, BadImage):
                    bad.append(str(found))
                    continue
                for kind in found:
                    odd.setdefault(kind, []).append(str(image_set.index.path(i)))
    return tuple(bad), {kind: tuple(paths) for kind, paths in sorted(odd.items())}


def _look(image_set: ImageSet, i: int) -> tuple[str, ...] | BadImage:
    """What is unusual about an image file; nothing for a .beton, which stores its own bytes."""
    try:
        if isinstance(image_set, FolderSet):
            return oddities(image_set.index.path(i), image_set.num_channels)
        image_set.read(i)
        return ()
    except BadImage as error:
        return error
    except DataTrouble as error:  # the report is about all files, those without permission too
        return BadImage(str(error))


def report_table(report: DataReport, split: str) -> Table:
    """The report as a table: counts, and the first of the files concerned."""
    table = Table(
        "what", "images", "which", title=f"{split}: {report.num_images} images, {_spread(report)}"
    )
    table.add_row("bad", str(len(report.bad)), _named(report.bad))
    for kind, paths in report.odd.items():
        table.add_row(kind, str(len(paths)), _named(paths))
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
