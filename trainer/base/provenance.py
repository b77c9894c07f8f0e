"""Where a result came from: commit, versions, machine."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.base.devices import ACCELERATORS, kind_of

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SHIPPED_ROOT = PACKAGE_ROOT  # of recipes/ and ablations/ in a source tree


def shipped_folder(name: str) -> Path:
    """A folder of recipes that comes with the package: beside it in a source tree, inside it in an
    installed wheel.
    """
    inside = Path(__file__).parents[1] / name
    return inside if inside.is_dir() else SHIPPED_ROOT / name


def package_version(name: str) -> str:
    """The installed version of a distribution, or "source" when it runs from a checkout that is not
    installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "source"


def versions() -> dict[str, str]:
    """The versions that can move a result."""
    named = {
        name: package_version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")
    }
    return {"python": platform.python_version(), **named, "trainer": package_version("rsb")}


@dataclass(frozen=True)
class Program:
    """The code that this process runs. digest: of the package's files. commit, dirty: see
    `commit`.
    """

    digest: str
    commit: str | None
    dirty: bool | None

    def __str__(self) -> str:
        commit = self.commit[:12] if self.commit else "none"
        return f"{self.digest[:12]} (commit {commit}{', changed' if self.dirty else ''})"


@functools.cache
def running_program() -> Program:
    """As it was when first asked for: what changes on the disk later is not what runs here."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*")):
        if "__pycache__" not in path.parts and path.is_file():
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return Program(digest.hexdigest(), *commit())


def commit() -> tuple[str | None, bool | None]:
    """(commit of the checkout the program runs from, whether tracked files differ from it); (None,
    None) outside one.
    """
    if not (PACKAGE_ROOT / ".git").exists():
        return None, None
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None, None
    # The store and the notes in it grow with every run: a new row is not a change of the program.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return head, bool(changed)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE_ROOT), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def tracked_names(folder: Path) -> set[str]:
    """The files right in a folder that git tracks, if it is one of the checkout that the program
    runs from: those that came with the project.
    """
    if not folder.resolve().is_relative_to(PACKAGE_ROOT) or not (PACKAGE_ROOT / ".git").exists():
        return set()
    listed = _git("ls-files", "-z", "--", str(folder.resolve())) or ""
    return {Path(path).name for path in listed.split("\0")}


def device_name(device: str) -> str:
    """The processor's or the accelerator's own name."""
    kind = kind_of(device)
    if kind in ("cuda", "xpu"):
        import torch  # seconds, which commands without it need not wait for

        return getattr(torch, kind).get_device_name(device)
    if kind == "mps":
        return f"{ACCELERATORS[kind]} ({platform.machine()})"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
