"""Images and masks as files of folders: by their names, or Pascal VOC's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from trainer.base.errors import DataError
from trainer.data.datasets.layouts import Layout
from trainer.data.image_folder import EXTENSIONS, FOLDERS, STAND_INS
from trainer.tasks.segmentation.masks import CLASSES_FILE, MaskedSet, read_classes, table_of

_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


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
        classes, table = read_classes(own) if own.exists() else table_of(own, list(_VOC))
        return MaskedSet(root, images, masks, classes, table, num_channels)


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
