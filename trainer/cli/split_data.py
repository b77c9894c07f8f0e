"""What the command split does."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from trainer.base.commands import command
from trainer.base.errors import UserError, printable
from trainer.data.datasets.split import TABLES, split_folder, split_name, split_table
from trainer.data.image_folder import has_class_folders, instead_of, is_image_folder


def split_data(data: str, out: Path | None, share: float, is_again: bool) -> None:
    """Split a folder or a table and say how to use it. Raises UserError, and as split_folder and
    split_table do.
    """
    root = Path(data)
    is_table = root.suffix in TABLES and root.is_file()
    if not is_table and not os.path.isdir(data):
        raise UserError(
            f"data={data}: no folder", "use a folder of class folders, or a .csv of path and label"
        )
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
    out = out or split_name(root)
    counts = (split_table if is_table else split_folder)(root, out, share, is_again)
    checks = command("check-data", data=out)
    line = f"{out}: {counts['train']} train and {counts['val']} val images, links to {root}"
    if "left_out" in counts:
        line += f"; {counts['left_out']} of its test left out"
    typer.echo(printable(f"{line}; next: {checks}"))
