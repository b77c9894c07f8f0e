"""Where this program keeps what it can make again."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """This program's cache folder of the user; a temporary one for a user without a home that can
    be written (a container's --user 12345).
    """
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named) / "rsb" if named else _home_cache() or temporary_cache()


def cache_note() -> str:
    """Where caches are, if not where they are looked for; else the empty string."""
    if os.environ.get("XDG_CACHE_HOME") or _home_cache():
        return ""
    return (
        f"no home to write to: caches are in {temporary_cache()}; XDG_CACHE_HOME=<a folder> keeps"
        " them"
    )


def _home_cache() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        return None
    folder = home / ".cache" / "rsb"
    there = next((path for path in (folder, folder.parent, home) if path.is_dir()), None)
    return folder if there and os.access(there, os.W_OK | os.X_OK) else None


@functools.cache
def temporary_cache() -> Path:
    """The folder rsb-<user> among the system's temporary files, or a fresh one where that name is
    another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"rsb-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="rsb-"))
