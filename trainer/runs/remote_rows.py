"""Rows in a store behind a URL (s3://, gs://, memory:// ... whatever fsspec knows), mirrored into a
folder.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.names import inside
from trainer.runs.results import LARGEST_ROW_KIB, Row, read_row_file

WAITS_S = (1.0, 4.0)  # before a store that did not answer is asked again


def is_url(text: str) -> bool:
    """Is it an address, not a folder?"""
    return "://" in text


def check_url(url: str) -> None:
    """Open the store once, before hours of training depend on it.

    Raises UserError where it cannot be listed.
    """
    try:
        _names(url)
    except Exception as error:  # each file system has errors of its own
        raise UserError(
            f"results={url}: cannot be listed ({_said(error)}); use a folder, or a URL that fsspec"
            " opens"
        ) from None


def _tried_again(function: Callable[..., None]) -> Callable[..., None]:
    """A function of (url, ...) that a network's error does not end at once: UserError where it
    fails time and again.
    """

    @functools.wraps(function)
    def wrapped(url: str, *given) -> None:
        """The function, tried once more after each of WAITS_S."""
        for wait_s in (*WAITS_S, None):
            try:
                return function(url, *given)
            except UserError:
                raise
            except Exception as error:
                if wait_s is None:
                    raise UserError(
                        f"results={url}: does not answer ({_said(error)}); rerun the same command"
                        " to resume once it does"
                    ) from None
                time.sleep(wait_s)

    return wrapped


@_tried_again
def pull_rows(url: str, folder: Path, prefixes: str | tuple[str, ...] = "") -> None:
    """Copy the rows whose names begin with one of the prefixes and that the folder lacks. Raises
    UserError.
    """
    system, root = _opened(url)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _names(url):
        if name.startswith(prefixes) and not (path := inside(folder, name, "row")).exists():
            # a byte more than a row may have: reading it back refuses what is larger
            write_atomically(
                path, system.cat_file(f"{root}/{name}", start=0, end=LARGEST_ROW_KIB * 1024 + 1)
            )


@_tried_again
def push_missing(url: str, folder: Path) -> None:
    """Put the folder's rows into the store that lacks them: a process was killed between the two.
    Raises UserError.
    """
    there = set(_names(url))
    for path in sorted(folder.glob("*.json")):
        if path.name not in there:
            push_row(url, read_row_file(path))


@_tried_again
def push_row(url: str, row: Row) -> None:
    """Put a row into the store; object stores show it whole or not at all. Raises UserError."""
    system, root = _opened(url)
    system.makedirs(root, exist_ok=True)
    system.pipe_file(f"{root}/{row.run}.json", row.as_json())


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _names(url: str) -> list[str]:
    system, root = _opened(url)
    system.invalidate_cache()
    if not system.exists(root):
        return []
    names = [path.rstrip("/").rpartition("/")[2] for path in system.ls(root, detail=False)]
    return sorted(name for name in names if name.endswith(".json"))


def _opened(url: str):
    import fsspec  # optional: only where results= is an address

    system, root = fsspec.core.url_to_fs(url)
    return system, f"{root.rstrip('/')}/rows"
