"""A folder of class folders, one whose splits have other names, or a table of paths and labels, as
train/ and val/, by links: the images stay where they are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base.disk import why
from trainer.base.errors import DataError, UserError
from trainer.base.json_text import json_file
from trainer.base.names import plain_text, why_no_name
from trainer.data.image_folder import EXTENSIONS, check_spelling, class_files

RULE = "of each class, the first by sha256 of class/file"
TABLES = (".csv", ".tsv", ".parquet")  # of paths and labels
_FACTS = "split.json"
_COLUMNS = {  # of a table, and how else they may be called
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class"),
    "split": ("split",),
}
_VAL_WORDS = ("val", "validation", "valid", "test")  # the last, where there is no other


def split_name(root: Path) -> Path:
    """Where a folder's split is made if nothing else is said: beside it."""
    root = Path(root) if Path(root).name not in ("", "..") else Path(root).resolve()
    name = root.stem if root.suffix in TABLES and root.is_file() else root.name
    return root.with_name(f"{name}-split")


def is_val(paths: list[bytes], val_share: float) -> list[bool]:
    """Which images of one class are validation images: by their names alone, whatever machine and
    order; at least one, and at most all but one.

    paths: <class>/<file>. val_share: in (0, 1), of the images, rounded.
    """
    num_val = min(max(1, round(len(paths) * val_share)), len(paths) - 1)
    chosen = set(sorted(paths, key=lambda path: hashlib.sha256(path).digest())[:num_val])
    return [path in chosen for path in paths]


def split_of(folder: Path) -> str:
    """The name of a folder's validation split, with its rule where this module made it."""
    try:
        facts = json_file(folder / _FACTS)
        if "column" in facts:
            return f"val (by the column split of {plain_text(facts['column'])})"
        if "folders" in facts:
            return f"val (the folder {plain_text(facts['folders']['val'])})"
        return f"val ({facts['val_share']:g} {RULE})"
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
    if root.resolve() in out.resolve().parents:
        raise UserError(f"{out}: lies in {root}, where it would be a class", "use another out=")
    links = []
    for paths in class_files(root).values():
        for split, name in _by_share(paths, val_share, root):
            links.append((split, os.fsdecode(name), root / os.fsdecode(name)))
    facts = {"of": str(root.resolve()), "val_share": val_share, "rule": RULE}
    return _link(out, links, facts, is_again)


def split_named(
    root: Path, out: Path, folders: Mapping[str, str], is_again: bool = False
) -> dict[str, int]:
    """The same of a folder whose splits have other names. folders: of "train" and of "val", below
    root. Each split has all images of its folder. Gives the images of each split.

    Raises UserError for a folder that is not there, or is both; DataError and others as
    split_folder does.
    """
    for split, name in folders.items():
        if not name or not (root / name).is_dir():
            found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
            raise UserError(f"{split}_split={name}: no folder of {root}", f"use one of: {found}")
    places = {os.path.realpath(root / name) for name in folders.values()}
    if len(places) < len(folders):
        raise UserError(
            f"train_split={folders['train']} val_split={folders['val']}: one folder",
            "use two, or leave both out",
        )
    if places & {os.path.realpath(one) for one in (out, *out.parents)}:
        raise UserError(f"{out}: lies in a split, where it would be a class", "use another out=")
    links = [
        (split, os.fsdecode(path), root / name / os.fsdecode(path))
        for split, name in folders.items()
        for paths in class_files(root / name).values()
        for path in paths
    ]
    return _link(out, links, {"of": str(root.resolve()), "folders": dict(folders)}, is_again)


def split_table(table: Path, out: Path, val_share: float, is_again: bool = False) -> dict[str, int]:
    """The same of a table: .csv, .tsv or .parquet with columns path, label and perhaps split. Gives
    the images of each split, and how many of its test were left out.

    Paths are below the table's folder, or absolute. An image is named by its file's name, or, where
    that names two of a class, by its whole path. With a column split the images stand where it
    says; "test" is the validation split where there is no other.

    Raises DataError for a row without image or label, an image or class that cannot be, a split
    that is none, and as split_folder does.
    """
    rows = _read_table(table)
    by_class: dict[str, list[TableRow]] = {}
    for row in rows:
        by_class.setdefault(row.label, []).append(row)
    check_spelling(table, tuple(sorted(by_class)))
    is_split = any(row.split for row in rows)
    val_words = _val_words({row.split for row in rows}) if is_split else ()
    links: list[tuple[str, str, Path]] = []
    left_out = 0
    for label, members in sorted(by_class.items()):
        names = _names_of(members)
        if not is_split:
            paths = sorted(os.fsencode(f"{label}/{name}") for name in names)
            splits = {
                os.fsdecode(name): split for split, name in _by_share(paths, val_share, table)
            }
        for name, row in zip(names, members, strict=True):
            split = splits[f"{label}/{name}"] if not is_split else row.split
            split = "val" if split in val_words else split
            if split in ("train", "val"):
                links.append((split, f"{label}/{name}", row.path))
            elif split in _VAL_WORDS:
                left_out += 1
            else:
                raise DataError(
                    f"{table}:{row.line}: split {split!r}", f"use train, {', '.join(_VAL_WORDS)}"
                )
    empty = {"train", "val"} - {split for split, _, _ in links}
    if is_split and empty:
        raise DataError(
            f"{table}: its column split has no row of {' and '.join(sorted(empty))}",
            "write some, or leave the column out",
        )
    how = {"column": table.name} if is_split else {"val_share": val_share, "rule": RULE}
    counts = _link(out, links, {"of": str(table.resolve()), **how}, is_again)
    return counts | ({"left_out": left_out} if left_out else {})


def _val_words(splits: set[str]) -> tuple[str, ...]:
    """The words of a table that mean its validation split: test only where there is no other."""
    return tuple(word for word in _VAL_WORDS[:-1] if word in splits) or _VAL_WORDS[-1:]


def _by_share(paths: list[bytes], val_share: float, where: Path) -> Iterator[tuple[str, bytes]]:
    """The split of each image of one class, by its name. Raises DataError for a single one."""
    if len(paths) < 2:
        raise DataError(
            f"{where / os.fsdecode(paths[0].partition(b'/')[0])}: one image only",
            "use two at least: for train and for val",
        )
    for name, in_val in zip(paths, is_val(paths, val_share), strict=True):
        yield ("val" if in_val else "train"), name


def _link(
    out: Path, links: Iterable[tuple[str, str, Path]], facts: dict[str, Any], is_again: bool
) -> dict[str, int]:
    """Make a folder of links, each (split, <class>/<file>, the image), at once.

    is_again: in the place of one that was made of the same.
    """
    is_same = _is_split_of(out, Path(facts["of"]))
    if os.path.lexists(out) and not (is_again and is_same):
        again = "again=1 to make it anew, if images came or went, " if is_same else ""
        raise UserError(
            f"{out}: is there already", f"use data={out} as it is, {again}or another out="
        )
    counts = {"train": 0, "val": 0}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for split, name, image in links:
            link = part / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())
            counts[split] += 1
        (part / _FACTS).write_text(json.dumps(facts | counts, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({why(error)})", "use another out=") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


class TableRow(NamedTuple):
    """One row of a table of images. line: in its file. split: in small
    letters, perhaps empty.
    """

    line: int
    path: Path
    label: str
    split: str


def _read_table(table: Path) -> list[TableRow]:
    read = _parquet_columns if table.suffix == ".parquet" else _csv_columns
    columns, lines = read(table)
    found = {key: next((columns[one] for one in words if one in columns), None)
             for key, words in _COLUMNS.items()}  # fmt: skip
    for key in ("path", "label"):
        if found[key] is None:
            raise DataError(
                f"{table}: no column {key} among {', '.join(columns) or 'none'}",
                "use the columns path and label, and split where it has one",
            )
    paths, labels = found["path"] or [], found["label"] or []
    splits = found["split"] or [None] * len(paths)
    rows: dict[Path, TableRow] = {}
    for line, given, label, split in zip(lines, paths, labels, splits, strict=True):
        where = f"{table}:{line}"
        path = table.parent / str(given or "")
        name = "" if label is None else str(label).strip()
        if not given or why_no_name(name) or name.startswith("."):
            raise DataError(
                f"{where}: path {given!r}, label {label!r}",
                "use a file's path and a label that a folder can be named",
            )
        is_image = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        if not is_image or not path.is_file():
            raise DataError(
                f"{where}: {path} is no image file", f"use a file of {' '.join(EXTENSIONS)}"
            )
        real = Path(os.path.realpath(path))
        if real in rows:
            raise DataError(f"{where}: {path} is in line {rows[real].line} too", "keep one")
        rows[real] = TableRow(line, path, name, str(split or "").strip().lower())
    if not rows:
        raise DataError(f"{table}: has no row", "use one for each image")
    return list(rows.values())


def _numbered(reader) -> Iterator[tuple[list[str], int]]:
    """Each row and the line that it ends in: a quoted cell may hold line breaks."""
    for line in reader:
        yield line, reader.line_num


def _csv_columns(table: Path) -> tuple[dict[str, list], list[int]]:
    """The columns by name, and the line of each row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
            head = [name.strip().lower() for name in next(reader, [])]
            lines = {number: line for line, number in _numbered(reader) if line}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error})", "use a .csv in UTF-8") from None
    for number, line in lines.items():
        if len(line) != len(head):
            raise DataError(
                f"{table}:{number}: {len(line)} values under {len(head)} names",
                "quote what holds a comma",
            )
    columns = {name: [line[place] for line in lines.values()] for place, name in enumerate(head)}
    return columns, list(lines)


def _parquet_columns(table: Path) -> tuple[dict[str, list], list[int]]:
    """The columns by name, and the number of each row."""
    try:
        import pyarrow.parquet  # optional dependency
    except ImportError:
        raise DataError(
            f"{table}: needs pyarrow, which is not installed",
            'run .venv/bin/python -m pip install "rsb[parquet]", or write it as a .csv',
        ) from None
    try:
        read = pyarrow.parquet.read_table(table)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{table}: damaged ({reason})", "write the file again") from None
    wanted = {word for words in _COLUMNS.values() for word in words}
    columns = {name: read[name].to_pylist() for name in read.column_names if name in wanted}
    return columns, list(range(1, read.num_rows + 1))


def _names_of(rows: list[TableRow]) -> list[str]:
    """The names of a class's images: of their files, or, where two files are named alike, of their
    whole paths below the folder that holds all of the class.
    """
    counts = Counter(row.path.name for row in rows)
    folders = [os.path.abspath(row.path.parent) for row in rows]
    common = os.path.commonpath(folders)
    return [
        row.path.name
        if counts[row.path.name] == 1
        else "__".join([*Path(folder).relative_to(common).parts, row.path.name])
        for row, folder in zip(rows, folders, strict=True)
    ]
