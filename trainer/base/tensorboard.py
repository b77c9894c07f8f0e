"""The command that shows a folder in TensorBoard, as a shell here takes it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from trainer.base.commands import installed_program


def tensorboard_command(folder: Path) -> str:
    """The program beside this Python, by a path from here where it lies below."""
    program = installed_program("tensorboard")
    words = [program] if program else [sys.executable, "-m", "tensorboard.main"]
    return shlex.join([*words, "--logdir", os.fspath(folder)])
