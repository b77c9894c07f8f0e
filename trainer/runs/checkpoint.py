"""Saving and resuming: files that a kill at any moment leaves whole.

A checkpoint is weights, optimizer, average, scaler, step and the length of the metrics: no
generator states, because nothing random is stored. Only tensors and plain types, so
`torch.load(..., weights_only=True)` opens it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.base.disk import (
    UnfitFile,
    open_regular,
    read_regular,
    removed_on_error,
    sync_folder,
    temporary_path,
    write_atomically,
)
from trainer.base.errors import UserError

NUM_KEPT = 2  # the last one, and the one before it in case the last is damaged
_LARGEST_CHECKSUM_BYTES = 4096
_NAME = re.compile(r"step_([0-9]+)\.pt")


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict,
    is_kept: bool = False,
    before_write: Callable[[Path], None] | None = None,
) -> Path:
    """Write the state after `step` steps as `step_<step>.pt` with its checksum, then drop all but
    the last two.

    Those of later steps are dropped too: a run resumes from the newest whole one, so they were
    damaged.

    is_kept: never drop this one; a mark beside it, `step_<step>.keep`, says so. The checksum is in
    place before the file appears under its own name, and both are synced, so a file that can be
    seen can be checked. What a killed process left half written or half removed goes. before_write:
    called with the path of the file that is about to be written.

    Raises OSError where the disk does not take it; those that were there stay, and nothing half
    written does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".step_*.part"):
        unfinished.unlink()
    path = folder / f"step_{step:09d}.pt"
    temporary = temporary_path(path)
    with removed_on_error(temporary):
        if before_write is not None:
            before_write(temporary)
        checksums = [_write_state(temporary, state).encode()]
        if _checksum_path(path).exists():
            # The same step saved again: a kill before the file is replaced must leave the old one
            # with its checksum.
            with contextlib.suppress(ValueError):
                checksums += [one.encode() for one in read_checksums(path)]
        write_atomically(_checksum_path(path), b"\n".join(checksums))
        if is_kept:
            _kept_path(path).touch()
        if path.is_dir():  # nothing of ours, and in the way
            path.rename(path.with_name(f"{path.name}.not-a-checkpoint"))
        os.replace(temporary, path)
    sync_folder(folder)
    paths = _newest_first(folder)
    place = paths.index(path)
    later = paths[:place]  # passed over when the run was resumed: damaged
    for old in later + [old for old in paths[place + NUM_KEPT :] if not _kept_path(old).exists()]:
        if not old.is_dir():
            old.unlink(missing_ok=True)
    _drop_orphans(folder)
    return path


def _drop_orphans(folder: Path) -> None:
    """Remove the checksums and marks of checkpoints that are gone, or that a kill kept from
    appearing.
    """
    for file in folder.glob("step_*"):
        if file.suffix in (".sha256", ".keep") and not file.with_suffix(".pt").exists():
            file.unlink(missing_ok=True)


def _write_state(path: Path, state: dict) -> str:
    """Write a state to the disk as it is serialized, without a copy of it in memory; gives its
    SHA-256.
    """
    with open(path, "wb", buffering=0) as file:
        hashed = _Hashed(file)
        before = torch.serialization.get_crc32_options()
        # a second checksum, which would take a sixth of the writer's time
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state, hashed)
        finally:
            torch.serialization.set_crc32_options(before)
        if hashed.error is not None:
            raise hashed.error
        os.fsync(file.fileno())
    return hashed.digest.hexdigest()


class _Hashed:
    """A file whose checksum grows with it.

    Torch's own writer, at an error in `write`, fails once more while it ends: so the error is kept,
    for later.
    """

    def __init__(self, file) -> None:
        self._file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, content) -> int:
        """All of content, counted into the checksum; an error is kept."""
        rest = memoryview(content)
        self.digest.update(rest)
        try:
            while self.error is None and len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return len(content)

    def flush(self) -> None:
        """Nothing: the file is flushed once, when it is whole."""


def load_checkpoint(
    folder: Path,
    say: Callable[[str], None],
    device: str = "cpu",
    check: Callable[[dict, int], None] = lambda state, step: None,
    largest_bytes: float = math.inf,
) -> dict | None:
    """The newest whole checkpoint of a folder, or None; each damaged one is passed over with a
    line.

    check: called with a state and the step of its file's name; raises ValueError for what is no
    state of the run. largest_bytes: of a checkpoint; a larger file is none.

    Raises UserError where a disk does not give one that is there: that may pass, and nothing is
    given up for it; and where all that are whole hold something else.
    """
    try:
        paths = _newest_first(folder)
    except OSError as error:
        raise _not_given(folder, error) from None
    other = ""
    for path in paths:
        fault = _damage(path, largest_bytes)
        if fault is None:
            try:
                state = _opened(path, device)
                check(state, _step_of(path))
                return state
            except UserError:
                raise
            except UnfitFile as error:
                fault = f"damaged ({error})"
            except ValueError as error:
                fault = f"no state of this run ({error})"
                other = other or f"{path.name} is {fault}"
        remedy = "falling back to the one before it"
        if path == paths[-1]:
            if other:
                raise UserError(
                    other,
                    "without this folder the run would start from the beginning",
                    place=str(folder),
                )
            remedy = "none is left, the run starts again"
        say(f"checkpoint {path.name} is {fault}: {remedy}")
    return None


def _opened(path: Path, device: str) -> dict:
    """The state in a file whose checksum is right. Raises UnfitFile where torch reads none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about somebody else's bytes
            state = torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except OSError as error:
        raise _not_given(path, error) from None
    except Exception as error:  # whatever torch raises over them
        raise UnfitFile(f"it cannot be read: {type(error).__name__}") from None
    if not isinstance(state, dict):
        raise UnfitFile("it cannot be read: no state")
    return state


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that this process alone writes
    in.
    """
    for path in folder.glob(".*.part"):
        if not path.name.startswith(".claim."):  # which others may be about to raise
            with contextlib.suppress(OSError):
                path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, which need not be there. Raises OSError where the disk does not
    show it.
    """
    # Not by glob, which takes a folder that may not be read for an empty one: the run would start
    # again, over all of them.
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        (folder / name for name in names if _NAME.fullmatch(name)), key=_step_of, reverse=True
    )


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _kept_path(path: Path) -> Path:
    return path.with_suffix(".keep")


def read_checksums(path: Path) -> list[str]:
    """What may be the SHA-256 of a checkpoint: two where it was being written once more.

    Raises OSError, and ValueError for what is no such file.
    """
    return read_regular(_checksum_path(path), _LARGEST_CHECKSUM_BYTES).decode("ascii").split()


def sha256_of(path: Path, largest_bytes: float) -> str:
    """The SHA-256 of a checkpoint's file. Raises OSError, and UnfitFile for what is none."""
    with open_regular(path, largest_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path, largest_bytes: float) -> str | None:
    try:
        expected, found = read_checksums(path), sha256_of(path, largest_bytes)
    except FileNotFoundError as error:
        return f"damaged (without {Path(error.filename).name})"
    except ValueError as error:
        return f"damaged ({error})"
    except OSError as error:
        raise _not_given(path, error) from None
    return None if found in expected else "damaged (its checksum differs)"


def _not_given(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror}); rerun the same command to resume once it can,"
        " or without this file"
    )
