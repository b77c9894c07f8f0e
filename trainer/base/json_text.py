"""JSON that somebody else may have written: plain data, or one ValueError."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

LARGEST_MIB = 64


def json_of(text: str | bytes) -> Any:
    """JSON text as plain data. Raises ValueError for all that is none, and for what is nested too
    deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_file(path: Path, largest_mib: float = LARGEST_MIB) -> Any:
    """The plain data in a file. Raises OSError, and ValueError as json_of does and for what is no
    file or too large.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
        raise ValueError("no file")
    if about.st_size > largest_mib * 2**20:
        raise ValueError(f"{about.st_size} bytes, of which at most {largest_mib:g} MiB are read")
    return json_of(path.read_bytes())
