"""Saving and resuming: files that a kill at any moment leaves whole.

A checkpoint is weights, optimizer, average, scaler, step and the length of the metrics: no generator states, because
nothing random is stored. Only tensors and plain types, so `torch.load(..., weights_only=True)` opens it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

NUM_KEPT = 2  # the last one, and the one before it in case the last is damaged


def save_checkpoint(folder: Path, step: int, state: dict) -> Path:
    """Write the state after `step` steps as `step_<step>.pt` with its checksum, then drop all but the last two.

    The checksum is in place before the file appears under its own name, and both are synced, so a file that can be
    seen can be checked. What a killed process left half written is removed.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".step_*.part"):
        unfinished.unlink()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step_{step:09d}.pt"
    checksums = [hashlib.sha256(buffer.getbuffer()).hexdigest().encode()]
    if _checksum_path(path).exists():
        # The same step saved again: a kill before the file is replaced must leave the old one with its checksum.
        checksums += _checksum_path(path).read_bytes().split()
    write_atomically(_checksum_path(path), b"\n".join(checksums))
    write_atomically(path, buffer.getbuffer())
    for old in _newest_first(folder)[NUM_KEPT:]:
        old.unlink()
        _checksum_path(old).unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, say: Callable[[str], None], device: str = "cpu") -> dict | None:
    """The newest whole checkpoint of a folder, or None; each damaged one is passed over with a line."""
    import torch

    paths = _newest_first(folder)
    for path in paths:
        damage = _damage(path)
        if damage is None:
            return torch.load(path, map_location=device, weights_only=True)
        remedy = "none is left, the run starts anew" if path == paths[-1] else "falling back to the one before it"
        say(f"checkpoint {path.name} is damaged ({damage}): {remedy}")
    return None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that its name shows the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = [path for path in folder.glob("step_*.pt") if path.stem[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _damage(path: Path) -> str | None:
    try:
        expected = _checksum_path(path).read_bytes().split()
        found = hashlib.sha256(path.read_bytes()).hexdigest().encode()
    except OSError as error:
        return f"unreadable: {error}"
    return None if found in expected else "its checksum differs"
