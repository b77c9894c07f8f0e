"""Names that become files, each kept in the folder that it names something of; and what a text may
hold.

A name comes from a row, a recipe or a store that somebody else may have written. What a user writes
as a path of their own is followed wherever it leads.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from trainer.base.errors import UserError, printable

LONGEST_NAME_BYTES = (
    230  # a file system's 255, less what stands around the name of a file that is being written
)


class FolderError(UserError):
    """A name, or a link, that leads out of its folder."""


def why_no_name(text: str) -> str | None:
    """Why a text cannot name one file in a folder; None where it can."""
    if text in ("", ".", ".."):
        return "names no file"
    if "/" in text or "\\" in text:
        return "leads into another folder"
    if not text.isprintable():
        return "holds a character that cannot be printed"
    if len(text.encode()) > LONGEST_NAME_BYTES:
        return f"is longer than {LONGEST_NAME_BYTES} bytes"
    return None


def one_name(text: str) -> str:
    """The text itself. Raises ValueError where it is not the name of one file: for the types of
    recipes and rows.
    """
    reason = why_no_name(text)
    if reason:
        raise ValueError(f"{reason}; use letters, digits, . and -")
    return text


def plain_text(text: str) -> str:
    """The text itself. Raises ValueError where it holds control characters, or half a
    character.
    """
    for mark in text:
        if unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\t\n":
            raise ValueError(f"holds the character {mark!a}; use printable text")
    return text


def inside(folder: Path, name: str, what: str) -> Path:
    """The path of a name in a folder, whether or not anything is there.

    Raises FolderError for a name that is none, and for a link that leads out of the folder. what:
    the user's word for it.
    """
    reason = why_no_name(name)
    if reason:
        raise FolderError(
            f"{what}={printable(name[:200])}: {reason}; use the name of one in {folder}"
        )
    path = folder / name
    if path.is_symlink() and not _is_within(path, folder):
        raise FolderError(f"{path}: a link that leads out of {folder}; use the {what} itself")
    return path


def check_links(folder: Path) -> None:
    """Refuse a folder with a link in it that leads out of it: what is written there would be
    written elsewhere.

    Raises FolderError.
    """
    for path in links_out(folder):
        raise FolderError(
            f"{path}: a link that leads out of {folder}; leave it out, or put the file itself there"
        )


def links_out(folder: Path) -> Iterator[Path]:
    """The links below a folder that lead out of it."""
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(place) / name
            if path.is_symlink() and not _is_within(path, folder):
                yield path


def _is_within(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead in a circle
        return False
