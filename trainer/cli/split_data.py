"""What the command split does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import typer

from trainer.base.commands import command
from trainer.base.errors import UserError, printable
from trainer.data.datasets.split import (
    TABLES,
    split_folder,
    split_name,
    split_named,
    split_table,
)
from trainer.data.image_folder import (
    folder_of_split,
    has_class_folders,
    instead_of,
    is_image_folder,
)


def split_data(
    data: str, out: Path | None, share: float, is_again: bool, train: str = "", val: str = ""
) -> None:
    """Split a folder or a table and say how to use it. train, val: the folders that are its splits.
    Raises UserError, and as split_folder, split_named and split_table do.
    """
    root = Path(data)
    is_table = root.suffix in TABLES and root.is_file()
    if not is_table and not os.path.isdir(data):
        raise UserError(
            f"data={data}: no folder", "use a folder of class folders, or a .csv of path and label"
        )
    out = out or split_name(root)
    if train or val:
        if is_table:
            raise UserError(f"{data}: is a table", "leave train_split= and val_split= out")
        folders = {
            "train": train or folder_of_split(root, "train").name,
            "val": val or folder_of_split(root, "val").name,
        }
        _say_made(root, out, split_named(root, out, folders, is_again))
        return
    _check_unsplit(root, data, share, is_table)
    _say_made(root, out, (split_table if is_table else split_folder)(root, out, share, is_again))


def _check_unsplit(root: Path, data: str, share: float, is_table: bool) -> None:
    """Refuse a folder that has splits, or no classes. Raises UserError."""
    if is_image_folder(root):
        raise UserError(f"{data}: has train/ already", f"use data={data} as it is")
    if not 0 < share < 1:
        raise UserError(f"share={share:g}: no share of the images", "use one in (0, 1): share=0.2")
    renames = "" if is_table else "".join(instead_of(root, name) for name in ("train", "val"))
    if renames:
        raise UserError(
            f"{data}: its folders are named like splits{renames}", "use it as it is then"
        )
    if not is_table and not has_class_folders(root):
        raise UserError(
            f"{data}: its folders hold no images themselves",
            "use a folder whose folders are the classes",
        )


def _say_made(root: Path, out: Path, counts: Mapping[str, int]) -> None:
    checks = command("check-data", data=out)
    line = f"{out}: {counts['train']} train and {counts['val']} val images, links to {root}"
    if "left_out" in counts:
        line += f"; {counts['left_out']} of its test left out"
    typer.echo(printable(f"{line}; next: {checks}"))
