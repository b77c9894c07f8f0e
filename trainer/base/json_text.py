"""JSON that somebody else may have written: plain data, or one ValueError."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.base.disk import UnfitFile, open_regular, read_regular

LARGEST_MIB = 64
_NUM_TAIL_BYTES = 8192


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


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings among the last lines (8 KiB) of a file of JSON lines; none where it is not
    there. What is no JSON, as a partly written line, is skipped.
    """
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _NUM_TAIL_BYTES))
            texts = file.read().splitlines()
    except (OSError, UnfitFile):
        return []
    lines = []
    for text in texts:
        try:
            line = json_of(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
