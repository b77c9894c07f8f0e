"""A file that grows at its end and loses nothing: what the disk does not take now is kept, and
written once it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.base.disk import UnfitFile, open_descriptor, open_regular
from trainer.base.errors import UserError
from trainer.base.json_text import json_of

# of a metrics.jsonl that is read whole: a line is about a hundred bytes
LARGEST_METRICS_BYTES = 2**29


def whole_lines(path: Path, num_bytes: int, sha256: str | None = None) -> bytes:
    """The first num_bytes bytes of a file of JSON lines: all of them, or the whole lines up to the
    first damaged one where it is shorter, or not of this SHA-256.

    sha256: None where it is not known; then each line is looked at. Nothing is read of what is no
    regular file. Raises OSError.
    """
    try:
        with open_regular(path) as file:
            content = file.read(num_bytes)
    except (FileNotFoundError, UnfitFile):
        return b""
    if len(content) == num_bytes and hashlib.sha256(content).hexdigest() == sha256:
        return content
    return b"".join(itertools.takewhile(_is_whole, io.BytesIO(content)))


def _is_whole(line: Any) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json_of(line), dict)
    except ValueError:
        return False


class KeptFile:
    """A file whose end one process writes; safe to use from several threads.

    num_bytes: its length at the start, what stands after that is cut away; None keeps all. is_safe:
    are its bytes kept until `sync` has put them on the disk for sure? Else until the system has
    taken them. error: why the last try to write failed, or None. before_write: called with the path
    first; what it raises that is no OSError is raised to the writer.

    A file or folder that is removed meanwhile is made again, with all that stood there.

    Raises UserError where it is no regular file, OSError where it cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        num_bytes: int | None = None,
        is_safe: bool = False,
        before_write: Callable[[Path], None] | None = None,
    ) -> None:
        self.path, self.is_safe, self._before_write = Path(path), is_safe, before_write
        self.error: OSError | None = None
        self.unwritten: bytes | None = None
        self._guard = threading.Lock()
        try:
            self._descriptor = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
        except UnfitFile as error:
            raise UserError(f"{self.path}: {error}; move it away") from None
        found = os.fstat(self._descriptor).st_size
        # bytes that need not be kept any more; to lengthen the file would fill it with zeros
        self._num_done = found if num_bytes is None else min(num_bytes, found)
        self._kept = bytearray()  # what comes after them
        self._num_written = 0  # of what is kept
        os.ftruncate(self._descriptor, self._num_done)

    @property
    def num_bytes(self) -> int:
        """The file's length with all that is still to be written."""
        with self._guard:
            return self._num_done + len(self._kept)

    def write(self, content: bytes) -> int:
        """Add bytes at the end; gives their number. Whether the disk has them is what `error`
        says.
        """
        with self._guard:
            self._kept += content
            self._flush()
        return len(content)

    def sync(self) -> None:
        """Put all that was added until now on the disk for sure. Raises OSError."""
        with self._guard:
            self._flush()
            if self.error is not None:
                raise self.error
            descriptor, num_new = self._descriptor, len(self._kept)
            copy = os.dup(descriptor)  # the file may be opened again while this waits
        try:
            os.fsync(copy)  # without the guard: nobody waits for the disk to add a line
        except OSError as error:
            with self._guard:
                # the system may have dropped what it had taken
                self._num_written, self.error = (
                    0,
                    error,
                )
            raise
        finally:
            os.close(copy)
        with self._guard:
            if self._descriptor == descriptor:
                self._forget(num_new)

    def close(self) -> None:
        """Try once more to write what is left, and let go of the file. `unwritten`: all of it,
        where that fails.
        """
        with self._guard:
            self._flush()
            if self.error is not None:
                try:
                    self.unwritten = self._before() + bytes(self._kept)
                except OSError:
                    self.unwritten = bytes(self._kept)
            try:
                os.close(self._descriptor)
            except OSError as error:  # a network file system tells of a failed write here
                self.error = self.error or error

    def abandon(self) -> None:
        """Let go of the file and write nothing more: it is another process's by now."""
        with self._guard, contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _flush(self) -> None:
        try:
            if self._before_write is not None:
                self._before_write(self.path)
            if not self._is_in_place():
                self._put_back()
            while self._num_written < len(self._kept):
                rest = bytes(self._kept[self._num_written :])
                self._num_written += os.pwrite(
                    self._descriptor, rest, self._num_done + self._num_written
                )
            if not self.is_safe:
                self._forget(len(self._kept))
            self.error = None
        except OSError as error:
            self.error = error

    def _forget(self, num_bytes: int) -> None:
        del self._kept[:num_bytes]
        self._num_done += num_bytes
        self._num_written -= num_bytes

    def _is_in_place(self) -> bool:
        """Is the open file the one that the path names? It is not where somebody removed or
        replaced it.
        """
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _put_back(self) -> None:
        """Open the path's own file, and give it what stood before that which is kept, unless it has
        that.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = open_descriptor(self.path, os.O_RDWR | os.O_CREAT)
        except UnfitFile as error:
            raise OSError(str(error)) from None
        try:
            if os.fstat(opened).st_size < self._num_done:
                content, done = self._before(), 0
                while done < len(content):
                    done += os.pwrite(opened, content[done:], done)
            os.ftruncate(opened, self._num_done)
        except OSError:
            os.close(opened)
            raise
        os.close(self._descriptor)
        self._descriptor, self._num_written = opened, 0

    def _before(self) -> bytes:
        """What stands before that which is kept, read from the open file: removed files can be read
        until closed.
        """
        content = os.pread(self._descriptor, self._num_done, 0)
        if len(content) < self._num_done:
            raise OSError(f"{len(content)} of {self._num_done} bytes are left of {self.path.name}")
        return content
