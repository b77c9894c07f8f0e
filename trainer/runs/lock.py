"""The lock on a run's folder: at most one process works there, on this machine or on any other.

Whoever wants a folder puts a lock file of its own into it and then looks around: where another
live one stands it removes its own again. Of two that come at once the later to look sees the
other, so never both stay; both may go, and come again.

A lock file is live as long as its process holds the kernel's lock on it, which ends with the
process however that ends. Between machines, where kernel locks cannot be trusted, it is live as
long as it was touched within the last minute, by the clock that dates the folder's files: the
heartbeat. One dated later than now, as a clock was set back, is dated now by whoever finds it:
touched again it is live, else it is stale in a minute. What is no regular file is no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from trainer.base.disk import UnfitFile, open_descriptor
from trainer.base.errors import UserError, printable
from trainer.base.json_text import json_of

HEARTBEAT_S = 10.0
STALE_S = 60.0
_LOOK_S = 1.0


class LockedError(UserError):
    """Another process works in a folder."""


class LockLost(Exception):
    """Another process took the folder over: whoever works in it must end."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. machine: one kernel since its start. has_lock: could the file be locked?"""

    host: str
    machine: str
    pid: int
    started_utc: str
    has_lock: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):  # a lock file may hold whatever somebody else has written
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                raise TypeError(f"{field.name} is {value!r}"[:100])

    def __str__(self) -> str:
        text = f"process {self.pid} on {self.host[:100]}, since {self.started_utc[:40]}"
        return printable(text) if self.pid else "a process on an unknown machine"


class Lock:
    """A folder that is this object's alone until `release`, or until the process ends; a context.

    A thread touches the file every 10 s until then. It also puts the lock file back where the
    whole folder was removed; where the file alone is gone, another process works there by now,
    and `check` raises from then on.
    """

    def __init__(self, folder: Path) -> None:
        self.lost: str | None = None
        self._guard = threading.RLock()
        self._released = threading.Event()
        self.path, self._descriptor, self._folder = _lock_file(folder)
        # A fork shares the open file, and with it the kernel's lock, which would outlive us there.
        os.register_at_fork(after_in_child=functools.partial(_forget, weakref.ref(self)))
        self._heartbeat = threading.Thread(
            target=self._beat_until_released, name="lock", daemon=True
        )
        self._heartbeat.start()

    def release(self) -> None:
        """Give the folder back and end the heartbeat; a second call does nothing."""
        with self._guard:
            if self._released.is_set():
                return
            self._released.set()
            with contextlib.suppress(
                OSError
            ):  # a disk that takes nothing any more: the lock ends all the same
                self.path.unlink()
            os.close(self._descriptor)
            os.close(self._folder)
        self._heartbeat.join(HEARTBEAT_S)  # it may hang in a network folder

    def check(self) -> None:
        """Raise LockLost once another process has taken the folder over.

        Where the folder was made again meanwhile its lock file is put back now, not at the next
        beat. Cheap enough for every step: two stats.
        """
        if self.is_folder_gone():
            self.beat()
        if self.lost is not None:
            raise LockLost(self.lost)

    def beat(self) -> None:
        """Touch the lock file, and put it back where its whole folder was removed."""
        with self._guard:
            if self._released.is_set() or self.lost is not None:
                return
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self._put_back()
            except OSError:  # a network folder that does not answer for a moment
                return

    def is_folder_gone(self) -> bool:
        """Was the folder removed, or is another one in its place?"""
        try:
            ours = os.fstat(self._folder)
            return ours.st_nlink == 0 or not os.path.samestat(ours, os.stat(self.path.parent))
        except OSError:
            return True

    def _put_back(self) -> None:
        folder = self.path.parent
        is_gone = self.is_folder_gone()
        if is_gone and not folder.is_dir():
            return  # there is nothing to put it into yet
        if not is_gone or owner_of(folder) is not None:
            self.lost = f"{self.path}: this lock was taken over by another process"
            return
        with contextlib.suppress(OSError):
            path, descriptor, held = _lock_file(folder)
            os.close(self._descriptor)
            os.close(self._folder)
            self.path, self._descriptor, self._folder = path, descriptor, held

    def _beat_until_released(self) -> None:
        next_s = time.monotonic() + HEARTBEAT_S
        while not self._released.wait(_LOOK_S):
            if time.monotonic() >= next_s or self.is_folder_gone():
                next_s = time.monotonic() + HEARTBEAT_S
                self.beat()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def _forget(reference: weakref.ref[Lock]) -> None:
    """In a fork: let go of the parent's lock without touching its file."""
    lock = reference()
    if lock is not None and not lock._released.is_set():
        lock._guard, lock._released = threading.RLock(), threading.Event()  # whatever a thread held
        lock._released.set()
        os.close(lock._descriptor)
        os.close(lock._folder)


def try_acquire(folder: Path, stale_s: float = STALE_S) -> Lock | None:
    """Lock a folder, made where it is not there; None where another lock on it is live."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    own = Lock(folder)
    others = [path for path in _lock_files(folder) if path != own.path]
    live = [path for path in others if _owner_if_live(path, stale_s) is not None]
    if live or not own.path.exists():
        own.release()
        return None
    for dead in others:
        dead.unlink(missing_ok=True)
    return own


def acquire(
    folder: Path,
    stale_s: float = STALE_S,
    look_s: float = _LOOK_S,
    check: Callable[[], None] = lambda: None,
) -> Lock:
    """Lock a folder or refuse.

    A lock of another machine may be that of a process that is gone: it is waited for, until it is
    touched again or is stale, with a line to stderr. check: called while it waits; what it raises
    ends the wait.

    Raises LockedError where another lock is live.
    """
    folder = Path(folder).resolve()
    own = try_acquire(folder, stale_s) or _after_the_gone(folder, stale_s, look_s, check)
    if own is None:
        who = owner_of(folder) or "another process"
        raise LockedError(f"{folder}: {who} is running here; wait for it to end, or stop it")
    return own


def _after_the_gone(
    folder: Path, stale_s: float, look_s: float, check: Callable[[], None]
) -> Lock | None:
    touched = _touched_elsewhere(folder, stale_s)
    if touched:
        who = owner_of(folder) or "another process"
        line = f"{folder}: {who} worked here; waiting up to {stale_s:g} s for a sign of its life"
        print(printable(line), file=sys.stderr, flush=True)
    while touched:
        check()
        time.sleep(look_s)
        own = try_acquire(folder, stale_s)
        if own is not None:
            return own
        if _touched_elsewhere(folder, stale_s) != touched:
            return try_acquire(folder, stale_s)
    return None


def _touched_elsewhere(folder: Path, stale_s: float) -> dict[Path, int]:
    """When each live lock was touched, if all are other machines'; none where one is of this
    one.
    """
    touched = {}
    for path in _lock_files(folder):
        owner = _owner_if_live(path, stale_s)
        if owner is None:
            continue
        if owner.has_lock and owner.machine == machine_id():
            return {}
        with contextlib.suppress(FileNotFoundError):
            touched[path] = os.stat(path).st_mtime_ns
    return touched


def owner_of(folder: Path, stale_s: float = STALE_S) -> Owner | None:
    """Who works in a folder now, as far as can be seen without a lock of one's own."""
    for path in _lock_files(Path(folder).resolve()):
        owner = _owner_if_live(path, stale_s)
        if owner is not None:
            return owner
    return None


def heartbeat_age_s(folder: Path) -> float | None:
    """Seconds since a lock file in a folder was touched, by this machine's clock; None where there
    is none. A live one is touched every HEARTBEAT_S.
    """
    touched = []
    for path in _lock_files(folder):
        with contextlib.suppress(FileNotFoundError):
            touched.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(touched)) if touched else None


def _lock_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("claim.*") if path.is_file())


def _lock_file(folder: Path) -> tuple[Path, int, int]:
    """A new lock file: (its path, its descriptor, the folder's).

    It is locked and written before it can be seen, so that a visible one without a lock is dead.
    While the folder's descriptor is open, no other folder gets its inode number.
    """
    name = f"claim.{machine_id()}.{os.getpid()}.{secrets.token_hex(4)}"
    hidden, path = folder / f".{name}.part", folder / name
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        has_lock = _lock_descriptor(descriptor, fcntl.F_WRLCK)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = Owner(socket.gethostname(), machine_id(), os.getpid(), started, has_lock)
        os.write(descriptor, json.dumps(asdict(owner)).encode())
        held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        os.rename(hidden, path)
    except BaseException:
        os.close(descriptor)
        raise
    return path, descriptor, held


def _lock_descriptor(descriptor: int, kind: int) -> bool:
    """Take the kernel's lock (F_WRLCK or F_RDLCK) on a file; False where it cannot be had.

    A lock of the open file, not of the process (F_OFD_SETLK, Linux 3.15): a POSIX lock ends as
    soon as the process closes any descriptor of the file, so that merely looking at its own lock
    file would drop it. The two kinds exclude each other. Without it flock, which on the BSDs
    excludes POSIX locks as well. Source: fcntl(2), "Open file description locks".
    """
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid (must be 0)
            fcntl.fcntl(
                descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
            )
        else:
            how = fcntl.LOCK_EX if kind == fcntl.F_WRLCK else fcntl.LOCK_SH
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError:  # for a new file: a file system without locks, where the heartbeat alone tells
        return False
    return True


def _owner_if_live(path: Path, stale_s: float) -> Owner | None:
    try:
        descriptor = open_descriptor(path, os.O_RDONLY)
    except (FileNotFoundError, UnfitFile):
        return None
    try:
        owner = _read_owner(descriptor)
        if owner is not None and owner.has_lock and owner.machine == machine_id():
            # A shared lock, so that two who look do not take each other for the owner.
            return None if _lock_descriptor(descriptor, fcntl.F_RDLCK) else owner
        is_fresh = _age_s(path, descriptor) < stale_s
        return (owner or Owner("", "", 0, "")) if is_fresh else None
    finally:
        os.close(descriptor)


def _age_s(path: Path, descriptor: int) -> float:
    """Seconds since a lock file was touched; one that is dated later than now is dated now."""
    touched_s = os.fstat(descriptor).st_mtime
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:  # dated by the file system's clock
            now_s = os.fstat(file.fileno()).st_mtime
    except OSError:
        now_s = time.time()
    if touched_s > now_s + _LOOK_S:
        with contextlib.suppress(OSError):
            os.utime(path, (now_s, now_s))
    return now_s - touched_s


def _read_owner(descriptor: int) -> Owner | None:
    try:
        return Owner(**json_of(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, OSError):
        return None


@functools.cache
def machine_id() -> str:
    """12 hex digits for the kernel that this process runs on, since it was started: locks hold
    within it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(boot.encode()).hexdigest()[:12]
