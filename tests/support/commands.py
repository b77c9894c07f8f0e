"""The program, called as a user calls it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app

ROOT = Path(__file__).parents[2]


def rsb(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rsb")


def program(*words: str) -> subprocess.CompletedProcess:
    """The whole program in its own process, as the Makefile calls it."""
    command = [sys.executable, "-m", "trainer", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> Path:
    """The Makefile in front of a program that prints what it is given, one word a line."""
    folder = tmp_path_factory.mktemp("door")
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "requirements.lock"):
        (folder / name).touch()
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport sys\nfor word in sys.argv[1:]: print(repr(word))\n"
    )
    python.chmod(0o755)
    (folder / ".venv" / ".ready").touch()
    hints = folder / "trainer" / "cli" / "hints.py"
    hints.parent.mkdir(parents=True)
    shutil.copy(ROOT / "trainer" / "cli" / "hints.py", hints)
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    } | environment
    return subprocess.run(
        ["make", *words], cwd=folder, capture_output=True, text=True, env=clean, timeout=60
    )
