"""A page that shows a data set: its classes, a few images of each, and what was found in it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from trainer.base.disk import write_atomically
from trainer.base.terminal import readable
from trainer.data.check import DataReport, duplicates
from trainer.data.datasets.builtin import ImageSet
from trainer.inference.images import SetPictures, seen_from
from trainer.inference.quality_page import inline, template
from trainer.inference.sheet import thumbnail

_MOST_CLASSES = 100  # in the histogram
_SHOWN_CLASSES, _IMAGES_EACH = 24, 6
_MOST_PATHS = 20
_TILE_PX = 112


def write_data_page(
    folder: Path,
    train: ImageSet,
    reports: Mapping[str, DataReport],
    title: str,
    facts: Sequence[tuple[str, str]],
) -> Path:
    """Write index.html, which names images as seen from the data set's folder; gives its path.
    reports: of train and val. facts: (name, value) pairs for its head. Raises OSError.
    """
    index = getattr(train, "index", None)  # of a set of files
    if index is not None:
        reports = {split: _from(index.root, report) for split, report in reports.items()}
    numbers = [reports[split].class_counts for split in ("train", "val")]
    classes = sorted(numbers[0], key=lambda name: (-numbers[0][name], name))
    kinds = {f"{split}: {kind}": paths for split, report in reports.items()
             for kind, paths in {"bad": report.bad, **report.odd}.items()}  # fmt: skip
    kinds |= duplicates(**reports)
    page = template("data.html").render(
        title=title,
        facts=facts,
        classes=[(readable(name), *(each[name] for each in numbers)) for name in classes],
        most=_MOST_CLASSES,
        largest=max(max(each.values()) for each in numbers),
        grid=[(readable(name), _tiles(train, number)) for number, name in _shown(train.classes)],
        found=[
            (kind, len(paths), [readable(path) for path in paths[:_MOST_PATHS]])
            for kind, paths in kinds.items()
            if paths
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def _from(root: Path, report: DataReport) -> DataReport:
    """A report whose files are named as seen from a folder."""
    seen, path = partial(seen_from, root), report.path
    return replace(
        report,
        bad=tuple(map(seen, report.bad)),
        odd={kind: tuple(map(seen, paths)) for kind, paths in report.odd.items()},
        path=lambda i: seen(path(i)),
    )


def _shown(classes: Sequence[str]) -> list[tuple[int, str]]:
    """All classes, or so many of them, evenly apart in the order of their names."""
    places = np.linspace(0, len(classes) - 1, min(len(classes), _SHOWN_CLASSES)).astype(int)
    return [(int(place), classes[place]) for place in places]


def _tiles(train: ImageSet, number: int) -> list[tuple[str, str]]:
    """(picture, name) of images of a class, evenly apart in its order."""
    pictures, members = SetPictures(train), np.flatnonzero(train.labels == number)
    places = np.linspace(0, len(members) - 1, min(len(members), _IMAGES_EACH)).astype(int)
    tiles = []
    for place in members[places].tolist():
        picture, content = pictures.picture(place), io.BytesIO()
        if picture is not None:
            thumbnail(picture, _TILE_PX).save(content, "JPEG", quality=80)
        tile = inline(content.getvalue(), "jpeg") if picture is not None else ""
        tiles.append((tile, readable(pictures.name(place))))
    return tiles
