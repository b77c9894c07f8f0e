"""A folder of class folders as train/ and val/, by links: the images stay where they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from trainer.base.disk import why
from trainer.base.errors import UserError
from trainer.base.json_text import json_file
from trainer.data.index import DataError, class_files

RULE = "of each class, the first by sha256 of class/file"
_FACTS = "split.json"


def split_name(root: Path) -> Path:
    """Where a folder's split is made if nothing else is said: beside it."""
    root = Path(root) if Path(root).name not in ("", "..") else Path(root).resolve()
    return root.with_name(f"{root.name}-split")


def is_val(paths: list[bytes], val_share: float) -> list[bool]:
    """Which images of one class are validation images: by their names alone, whatever machine and
    order; at least one, and at most all but one.

    paths: <class>/<file>. val_share: in (0, 1), of the images, rounded.
    """
    num_val = min(max(1, round(len(paths) * val_share)), len(paths) - 1)
    chosen = set(sorted(paths, key=lambda path: hashlib.sha256(path).digest())[:num_val])
    return [path in chosen for path in paths]


def split_of(folder: Path) -> str:
    """The name of a folder's validation split, with its rule where split_folder made it."""
    try:
        share = json_file(folder / _FACTS)["val_share"]
        return f"val ({share:g} {RULE})"
    except (OSError, ValueError, KeyError, TypeError):
        return "val"


def _is_split_of(out: Path, root: Path) -> bool:
    """Is a folder the split of another, with nothing in it but links?"""
    try:
        is_its = json_file(out / _FACTS)["of"] == str(root.resolve())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = (Path(folder) / name for folder, _, names in os.walk(out) for name in names)
    return is_its and all(path.is_symlink() or path == out / _FACTS for path in files)


def split_folder(root: Path, out: Path, val_share: float, is_again: bool = False) -> dict[str, int]:
    """Make out/train/<class>/ and out/val/<class>/ of links to the images of root/<class>/, and
    out/split.json, which says how. Gives the images of each split. is_again: in the place of an
    earlier split of the same folder.

    Raises DataError for a class of one image, and as class_files does; UserError where `out` is
    there already or cannot be written.
    """
    if os.path.lexists(out) and not (is_again and _is_split_of(out, root)):
        again = (
            "again=1 to make it anew, if images came or went, " if _is_split_of(out, root) else ""
        )
        raise UserError(
            f"{out}: is there already", f"use data={out} as it is, {again}or another out="
        )
    if root.resolve() in out.resolve().parents:
        raise UserError(f"{out}: lies in {root}, where it would be a class", "use another out=")
    by_class = class_files(root)
    for name in (name for name, paths in by_class.items() if len(paths) < 2):
        raise DataError(f"{root / name}: one image only", "use two at least: for train and for val")
    counts = {"train": 0, "val": 0}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for paths in by_class.values():
            for path, in_val in zip(paths, is_val(paths, val_share), strict=True):
                split, name = "val" if in_val else "train", os.fsdecode(path)
                link = part / split / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((root / name).resolve())
                counts[split] += 1
        facts = {"of": str(root.resolve()), "val_share": val_share, "rule": RULE, **counts}
        (part / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({why(error)})", "use another out=") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts
