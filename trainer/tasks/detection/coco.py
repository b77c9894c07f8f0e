"""COCO's JSON: images, annotations and categories of one split in one file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.base.errors import DataError
from trainer.base.json_text import json_file
from trainer.tasks.detection.annotations import Annotations, Gathered

_SPLITS = {"train": "train", "val": "val(?:id|idation)?"}
_EXPORT = "_annotations.coco.json"  # Roboflow's, beside the images of a split
_START_BYTES = 2**20
_KEYS = ("images", "categories", "annotations")


def annotation_files(root: Path, split: str) -> list[Path]:
    """The JSON of a split: instances_train.json, instances_train2017.json or train.json in root or
    root/annotations, or train/_annotations.coco.json; all that there are. A train.json may be of
    something else, and is one only with a list of COCO's.
    """
    named = re.compile(rf"(?:instances_)?{_SPLITS[split]}(?:20\d\d)?\.json", re.IGNORECASE)
    beside = re.compile(_SPLITS[split], re.IGNORECASE)
    found = [
        path
        for folder in (root, root / "annotations")
        for path in (sorted(folder.glob("*.json")) if folder.is_dir() else ())
        if named.fullmatch(path.name)
        and not path.with_suffix(".beton").exists()  # whose facts it has
        and (path.name.lower().startswith("inst") or _has_lists(path))
    ]
    return found + [
        path for path in sorted(root.glob(f"*/{_EXPORT}")) if beside.fullmatch(path.parent.name)
    ]


def _has_lists(path: Path) -> bool:
    """Is one of COCO's lists named in the beginning of a file?"""
    try:
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError:
        return False
    return any(b'"%s"' % key.encode() in start for key in _KEYS)


def read_split(root: Path, split: str) -> Annotations:
    """The boxes of a split of a folder. Raises DataError without a JSON of it, or with several."""
    found = annotation_files(root, split)
    if not found:
        raise DataError(
            f"no boxes of {split}", f"add instances_{split}.json, as COCO has it", place=str(root)
        )
    if len(found) > 1:
        names = " and in ".join(str(path.relative_to(root)) for path in found[:2])
        raise DataError(f"boxes of {split} both in {names}", "keep one of them", place=str(root))
    about = found[0].stat()
    return _read_once(found[0], root, (about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=4)  # COCO's own file takes seconds, and is asked for by the plan and the run
def _read_once(file: Path, root: Path, _: tuple[int, int]) -> Annotations:
    return read_coco(file, root)


def read_coco(file: Path, root: Path) -> Annotations:
    """The boxes of a JSON file. Images are numbered by their file names, classes by their ids.

    Raises DataError for a file that is not COCO's, or whose images are nowhere.
    """
    try:
        data = json_file(file)
    except (OSError, ValueError) as error:
        raise _not_coco(file, str(error)) from None
    if not isinstance(data, Mapping):
        raise _not_coco(file, "no mapping")
    images, categories, boxes = (_entries(file, data, key) for key in _KEYS)
    ids = [_value(file, one, "id", int) for one in categories]
    classes = [_value(file, one, "name", str) for one in categories]
    for what, values in (("id", ids), ("name", classes)):
        for twin in (value for value, number in Counter(values).items() if number > 1):
            raise _not_coco(file, f"two categories of the {what} {twin!r}")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    labels = {ids[place]: label for label, place in enumerate(order)}
    gathered = Gathered(file, tuple(classes[place] for place in order))
    numbers: dict[int, int] = {}
    for image in sorted(images, key=lambda one: _value(file, one, "file_name", str)):
        number = _value(file, image, "id", int)
        if number in numbers:
            raise _not_coco(file, f"two images of the id {number}")
        sides = (_value(file, image, side, int) for side in ("width", "height"))
        numbers[number] = gathered.add_image(image["file_name"], *sides)
    for place, box in enumerate(boxes):
        _add(gathered, box, place, numbers, labels)
    return gathered.annotations(_image_folder(file, root, gathered.names))


def _add(
    gathered: Gathered,
    box: Mapping[str, Any],
    place: int,
    numbers: Mapping[int, int],
    labels: Mapping[int, int],
) -> None:
    where = f"annotation {box.get('id', f'number {place + 1}')}"
    named, category = box.get("image_id"), box.get("category_id")
    image = numbers.get(named) if isinstance(named, int) else None
    if image is None:
        gathered.add_fault(None, where, f"unknown image (image_id {named})")
    elif not isinstance(category, int) or category not in labels:
        gathered.add_fault(image, where, f"unknown class (category_id {category})")
    else:
        try:
            left, top, width, height = map(float, box["bbox"])
        except (KeyError, TypeError, ValueError):
            gathered.add_fault(image, where, f"no box of four numbers ({box.get('bbox')})")
            return
        sides = (left, top, left + width, top + height)
        gathered.add_box(image, where, sides, labels[category], bool(box.get("iscrowd", 0)))


def _image_folder(file: Path, root: Path, names: list[str]) -> Path:
    """Where the images of a JSON are: in a folder of its split's name, or beside it."""
    stem = re.sub(r"^instances_", "", file.stem)
    tried = [
        root / "images" / stem,
        root / stem,
        root / "images",
        root / "images" / re.sub(r"20\d\d$", "", stem),
        root,
        file.parent,
    ]
    for folder in tried:
        if any((folder / name).is_file() for name in names[:20]):
            return folder
    shown = f"{names[0]} is" if names else "it names none"
    raise DataError(
        f"its images are nowhere: {shown} not in {', '.join(str(each) for each in tried[:3])}",
        f"put them into {tried[0]}",
        place=str(file),
    )


def _entries(file: Path, data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise _not_coco(file, f"no list {key!r}")
    return found


def _value(file: Path, entry: Mapping[str, Any], key: str, kind: type) -> Any:
    found = entry.get(key)
    if isinstance(found, bool) or not isinstance(found, kind):
        raise _not_coco(file, f"an entry without {key!r}, or not as {kind.__name__}: {entry}")
    return found


def _not_coco(file: Path, found: str) -> DataError:
    return DataError(
        f"not COCO's JSON ({found[:200]})",
        "use one with the lists images (id, file_name, width, height), annotations (image_id,"
        " category_id, bbox as left, top, width, height) and categories (id, name)",
        place=str(file),
    )
