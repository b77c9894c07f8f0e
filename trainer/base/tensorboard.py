"""The command that shows a folder in TensorBoard, as a shell here takes it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def tensorboard_command(folder: Path) -> str:
    """The program beside this Python, by a path from here where it lies below."""
    program = Path(sys.executable).with_name("tensorboard")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    words = [str(program)] if program.exists() else [sys.executable, "-m", "tensorboard.main"]
    return shlex.join([*words, "--logdir", os.fspath(folder)])
