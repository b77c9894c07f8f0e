"""Files that are whole or absent, and a disk that takes nothing: what to say of it, and how long to
try.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.base.errors import UserError

SAY_S = 60.0  # between two lines about a disk that takes nothing
RETRY_S = 10.0  # between two checkpoints that are tried while it takes none
END_S = 60.0  # how long a finished run tries to write its end
STOP_S = 10.0  # how long one that was asked to stop does
_END_RETRY_S = 2.0


class UnfitFile(ValueError):
    """Under a file's name stands a folder, pipe or device, or a file too large to be read."""


def open_descriptor(path: Path, flags: int, largest_bytes: float = math.inf) -> int:
    """The descriptor of a regular file of at most so many bytes; a pipe or device is not waited
    for.

    Raises UnfitFile for what is none, OSError where it cannot be opened.
    """
    try:
        # O_NONBLOCK: to open a pipe without a writer, or some devices, would wait for ever
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder to write; a socket, a device
            raise UnfitFile("not a regular file") from None
        raise
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_size <= largest_bytes:
        return descriptor
    os.close(descriptor)
    if not stat.S_ISREG(about.st_mode):
        raise UnfitFile("not a regular file")
    raise UnfitFile(f"{about.st_size} bytes, of which at most {largest_bytes:.0f} are read")


def open_regular(path: Path, largest_bytes: float = math.inf) -> BinaryIO:
    """A regular file of at most so many bytes, to be read. Raises as open_descriptor does."""
    return os.fdopen(open_descriptor(path, os.O_RDONLY, largest_bytes), "rb")


def read_regular(path: Path, largest_bytes: float = math.inf) -> bytes:
    """The content of a regular file. Raises as open_descriptor does."""
    with open_regular(path, largest_bytes) as file:
        return file.read()


def why(error: OSError) -> str:
    """The system's words for an error, without the path."""
    return error.strerror or str(error)


@contextlib.contextmanager
def must_write(folder: Path) -> Iterator[None]:
    """A block without which no run begins. Raises UserError where the disk does not take what it
    writes.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({why(error)}); check free space and permissions, or use"
            " runs=<another folder>"
        ) from None


class Troubles:
    """Failed writes: logged at once, then once a minute, and when all of it is written."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._texts: dict[str, str] = {}
        self._said_s = -math.inf

    def note(self, what: str, error: OSError | None, more: str = "") -> None:
        """How the last try to write something ended; more: logged with its failure."""
        if error is not None:
            self._texts[what] = f"{what} ({why(error)}{more})"
            self.log()
        elif self._texts.pop(what, None) and not self._texts:
            self._said_s = -math.inf
            self._say(f"{self._folder}: all is written again")

    def log(self) -> None:
        """Log what is not written, once a minute."""
        if self._texts and time.monotonic() - self._said_s >= SAY_S:
            self._said_s = time.monotonic()  # first: what is logged goes to a file on the same disk
            self._say(
                f"{self._folder}: cannot write {', '.join(self._texts.values())}; training"
                " continues and retries"
            )


def keep_trying(
    write: Callable[[], None], for_s: float, is_over: Callable[[], bool] = lambda: False
) -> OSError | None:
    """Call `write` until it raises no OSError, for so many seconds at most; gives the last one.
    is_over: stop trying?
    """
    until_s = time.monotonic() + for_s
    while True:
        try:
            write()
            return None
        except OSError as error:
            if time.monotonic() >= until_s or is_over():
                return error
        time.sleep(min(_END_RETRY_S, max(0.0, until_s - time.monotonic())))


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that its name shows the old content or the new, never a part."""
    temporary = temporary_path(path)
    with removed_on_error(temporary):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """Where a process writes a file before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def removed_on_error(temporary: Path) -> Iterator[None]:
    """A block that leaves no half-written file on a full disk."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk for sure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
