"""JSON that somebody else may have written: plain data, or one ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.base.disk import read_regular

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
    return json_of(read_regular(path, largest_mib * 2**20))
