"""VOC's layout: JPEGImages/, Annotations/<image>.xml and the lists in ImageSets/Main/."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from trainer.base.disk import UnfitFile, read_regular
from trainer.base.errors import DataError
from trainer.tasks.detection.annotations import Annotations, Gathered

# the lists that a split may have, the first that is there
LISTS = {"train": ("train", "trainval"), "val": ("val", "test")}
_FIRST = 1  # VOC counts pixels from 1, and a box includes its last one
_SIZE = ("width", "height")
_SIDES = ("xmin", "ymin", "xmax", "ymax")

_LARGEST_BYTES = 2**24  # of an annotation: tens of thousands of boxes


def list_file(root: Path, split: str) -> Path | None:
    """The list of a split's images, or None where a folder is not laid out as VOC's."""
    if not (root / "Annotations").is_dir():
        return None
    places = (root / "ImageSets" / "Main" / f"{name}.txt" for name in LISTS[split])
    return next((path for path in places if path.is_file()), None)


def read_split(root: Path, split: str, classes: tuple[str, ...] | None = None) -> Annotations:
    """The boxes of a split of a folder; classes: as of read_voc. Raises DataError without a list
    of it.
    """
    file = list_file(root, split)
    if file is None:
        names = " or ".join(f"{name}.txt" for name in LISTS[split])
        where = root / "ImageSets" / "Main"
        raise DataError(f"no list of {split}", f"add {names}", place=str(where))
    return read_voc(file, root, classes)


def read_voc(file: Path, root: Path, classes: tuple[str, ...] | None = None) -> Annotations:
    """The boxes of the images in a list, each from its XML. classes: absent, all names in these
    files, sorted.

    A box from pixel 1 to pixel 10 is 10 px wide: from 0 to 10 here. What is marked difficult is a
    crowd: not trained on, and neither right nor wrong in a score.

    Source: Everingham et al. 2010 (the VOC development kit).
    """
    entries = []
    for name in _names(file):
        entries.append((name, _root_of(root / "Annotations" / f"{name}.xml")))
    named = {thing.findtext("name") or "" for _, tree in entries for thing in tree.iter("object")}
    gathered = Gathered(file, tuple(sorted(named - {""})) if classes is None else classes)
    labels = {name: label for label, name in enumerate(gathered.classes)}
    for name, tree in entries:
        _add(gathered, name, tree, labels)
    return gathered.annotations(root / "JPEGImages")


def _add(gathered: Gathered, name: str, tree: ElementTree.Element, labels: dict[str, int]) -> None:
    try:
        width, height = (int(float(tree.findtext(f"size/{side}", ""))) for side in _SIZE)
    except ValueError:
        place = str(gathered.file.parents[2] / "Annotations" / f"{name}.xml")
        raise DataError("no <size> with <width> and <height>", "add it", place=place) from None
    image = gathered.add_image(tree.findtext("filename") or f"{name}.jpg", width, height)
    for number, thing in enumerate(tree.iter("object")):
        where, called = f"object {number + 1}", thing.findtext("name") or ""
        if called not in labels:
            gathered.add_fault(image, where, f"unknown class ({called})")
            continue
        try:
            sides = [float(thing.findtext(f"bndbox/{side}", "")) for side in _SIDES]
        except ValueError:
            gathered.add_fault(image, where, "no box of four numbers")
            continue
        left, top, right, bottom = sides
        box = left - _FIRST, top - _FIRST, right, bottom
        gathered.add_box(image, where, box, labels[called], thing.findtext("difficult") == "1")


def _names(file: Path) -> list[str]:
    """The names in a list, sorted: some lists of one class have a second column."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read ({error})", "list one image a line", place=str(file)
        ) from None
    names = sorted({line.split()[0] for line in lines if line.strip()})
    if not names:
        raise DataError("lists no image", "list one image a line", place=str(file))
    return names


def _root_of(path: Path) -> ElementTree.Element:
    try:
        text = read_regular(path, _LARGEST_BYTES).decode()
        if "<!DOCTYPE" in text or "<!ENTITY" in text:  # which may grow without end
            raise ValueError("it declares a document type or entities, which VOC's files do not")
        return ElementTree.fromstring(text)
    except (OSError, UnfitFile, ValueError, ElementTree.ParseError) as error:
        raise DataError(
            f"cannot be read ({error})",
            "use an intact file, or leave the image out of the list",
            place=str(path),
        ) from None
