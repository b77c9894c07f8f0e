"""The project's own recipes, ablations and results, without what a user's work has left beside
them.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("recipes", "ablations", "results")


@functools.cache
def committed_root() -> Path:
    """A folder with copies of the files that git tracks in FOLDERS; of all files without git."""
    made = _folder()
    for path in _tracked():
        if (ROOT / path).is_file():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, made / path)
    return made


def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="rsb-committed-")
    _KEPT.append(made)  # removed when the process ends
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory] = []


def _tracked() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *FOLDERS]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
        return [path.relative_to(ROOT) for path in paths if path.is_file()]
    return [Path(name) for name in names.split("\0") if name]
