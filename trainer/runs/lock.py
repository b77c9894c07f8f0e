"""Claims: at most one process works in a folder, on this machine or on any that shares it.

Whoever wants a folder raises a flag in it, a file of its own, and then looks around: where another live flag stands it
takes its own down again. Of two that come at once the later to look sees the other, so never both stay; both may go,
and come again. A flag is live as long as its process holds the kernel's lock on it, which ends with the process
however that ends. Between machines, where locks cannot be trusted, it is live as long as it was touched in the last
minute.
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
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from trainer.base.errors import UserError
from trainer.base.json_text import json_of

BEAT_S = 10.0
STALE_S = 60.0
_LOOK_S = 1.0

_held: dict[
    Path, Claim
] = {}  # by this process; to open and close one of these files would drop its lock
_guard = threading.Lock()
_hearts: list[threading.Thread] = []


class ClaimedError(UserError):
    """Another process works in a folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim. machine: one kernel since its start. has_lock: could the file be locked at all?"""

    host: str
    machine: str
    pid: int
    started_utc: str
    has_lock: bool = True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started_utc}"


class Claim:
    """A folder that this process alone works in, until it is released or the process ends; a context."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._folder = os.open(
            path.parent, os.O_RDONLY | os.O_CLOEXEC
        )  # while it is open, no other folder has its number

    def release(self) -> None:
        with _guard:
            _held.pop(self.path, None)
            with contextlib.suppress(
                OSError
            ):  # a disk that takes nothing any more: the lock ends all the same
                self.path.unlink()
            os.close(self._descriptor)
            os.close(self._folder)

    def is_folder_gone(self) -> bool:
        """Was the claimed folder removed, or is another one in its place?"""
        try:
            claimed_one = os.fstat(self._folder)
            return claimed_one.st_nlink == 0 or not os.path.samestat(
                claimed_one, os.stat(self.path.parent)
            )
        except OSError:
            return True

    def raise_again(self) -> None:
        """Raise the flag anew in the folder that stands in the place of the one that is gone."""
        new = _raise_flag(self.path.parent)
        with _guard:
            for descriptor in (self._descriptor, self._folder):
                os.close(descriptor)
            del _held[self.path]
            self.path, self._descriptor, self._folder = new.path, new._descriptor, new._folder
            _held[self.path] = self

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception) -> None:
        self.release()


def claim(folder: Path, stale_s: float = STALE_S) -> Claim | None:
    """Claim a folder, made where it is not there; None where another claim on it is live."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    own = _raise_flag(folder)
    others = [path for path in folder.glob("claim.*") if path != own.path]
    live = [
        path for path in others if _owner_if_live(path, stale_s, _server_now_s(own)) is not None
    ]
    if live or not own.path.exists():
        own.release()
        return None
    for dead in others:
        dead.unlink(missing_ok=True)
    return own


def claimed(folder: Path, stale_s: float = STALE_S, look_s: float = _LOOK_S) -> Claim:
    """Claim a folder or refuse.

    A claim of another machine may be that of a process that is gone: it is waited for, until it is touched again or is
    stale, with a line to stderr.

    Raises ClaimedError where another claim is live.
    """
    own = claim(folder, stale_s) or _after_the_gone(Path(folder).resolve(), stale_s, look_s)
    if own is None:
        raise ClaimedError(
            f"{folder}: {owner_of(folder) or 'another process'} works here; wait for its end, or stop it"
        )
    return own


def _after_the_gone(folder: Path, stale_s: float, look_s: float) -> Claim | None:
    touched = _touched_elsewhere(folder, stale_s)
    if touched:
        print(
            f"{folder}: {owner_of(folder) or 'another process'} worked here; waiting up to {stale_s:g} s for a sign of its life",
            file=sys.stderr,
            flush=True,
        )
    while touched:
        time.sleep(look_s)
        own = claim(folder, stale_s)
        if own is not None:
            return own
        if _touched_elsewhere(folder, stale_s) != touched:
            return claim(folder, stale_s)
    return None


def _touched_elsewhere(folder: Path, stale_s: float) -> dict[Path, int]:
    """When each live claim was touched, where all of them are other machines'; none where one is of this machine."""
    touched = {}
    for path in folder.glob("claim.*"):
        owner = _owner_if_live(path, stale_s, datetime.now(UTC).timestamp())
        if owner is None:
            continue
        if owner.has_lock and owner.machine == machine_id():
            return {}
        with contextlib.suppress(FileNotFoundError):
            touched[path] = os.stat(path).st_mtime_ns
    return touched


def owner_of(folder: Path, stale_s: float = STALE_S) -> Owner | None:
    """Who works in a folder now, as far as can be seen without a claim of one's own."""
    for path in sorted(Path(folder).resolve().glob("claim.*")):
        owner = _owner_if_live(path, stale_s, datetime.now(UTC).timestamp())
        if owner is not None:
            return owner
    return None


def _raise_flag(folder: Path) -> Claim:
    """A file of our own: locked and written before it can be seen, so that a visible one without a lock is dead."""
    name = f"claim.{machine_id()}.{os.getpid()}.{secrets.token_hex(4)}"
    hidden, path = folder / f".{name}.part", folder / name
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        has_lock = True
    except OSError:  # a file system without locks: the heartbeat alone tells
        has_lock = False
    started = datetime.now(UTC).isoformat(timespec="seconds")
    owner = Owner(socket.gethostname(), machine_id(), os.getpid(), started, has_lock)
    os.write(descriptor, json.dumps(asdict(owner)).encode())
    own = Claim(path, descriptor)
    with _guard:
        _held[path] = own
    os.rename(hidden, path)
    _start_heart()
    return own


def _owner_if_live(path: Path, stale_s: float, now_s: float) -> Owner | None:
    with _guard:  # none of our own files may be opened and closed, not even by another thread
        if path in _held:
            return _read_owner(_held[path]._descriptor)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            owner = _read_owner(descriptor)
            if owner is not None and owner.has_lock and owner.machine == machine_id():
                return owner if _is_locked(descriptor) else None
            is_fresh = now_s - os.fstat(descriptor).st_mtime < stale_s
            return (owner or Owner("an unknown machine", "", 0, "")) if is_fresh else None
        finally:
            os.close(descriptor)


def _read_owner(descriptor: int) -> Owner | None:
    try:
        return Owner(**json_of(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, OSError):
        return None


def _is_locked(descriptor: int) -> bool:
    """Does another process hold the lock? A shared lock is tried, so that two who look do not take each other for it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _server_now_s(own: Claim) -> float:
    """The time on the clock that dates the folder's files, which need not be ours."""
    return os.fstat(own._descriptor).st_mtime


@functools.cache
def machine_id() -> str:
    """12 hex digits for the kernel that this process runs on, since it was started: locks hold within it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        import uuid

        boot = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def _start_heart() -> None:
    with _guard:
        if not _hearts:
            _hearts.append(threading.Thread(target=_beat_for_ever, name="claims", daemon=True))
            _hearts[0].start()


def _beat_for_ever() -> None:
    while True:
        time.sleep(BEAT_S)
        beat()


def _forget() -> None:
    """A fork has neither the claims nor the threads of the process that it comes from."""
    global _guard
    _guard = threading.Lock()
    _held.clear()
    _hearts.clear()


os.register_at_fork(after_in_child=_forget)


def beat() -> None:
    """Touch every claim of this process, and raise it anew where its whole folder was removed.

    Where the claim alone is gone another process works there by now: this one ends at once.
    """
    with _guard:
        held = list(_held.values())
    for own in held:
        try:
            os.utime(own.path)
        except FileNotFoundError:
            if not _is_still_own(own):
                print(
                    f"{own.path}: this claim was taken over by another process; ending",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
        except OSError:  # a network folder that does not answer for a moment
            continue


def make_folder(folder: Path) -> None:
    """Make a folder that may have been removed while this process works in it, and its claim with it."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        beat()


def _is_still_own(own: Claim) -> bool:
    """Of a claim whose file is gone: was only its folder removed? Then its flag is raised again, once there is a folder."""
    with _guard:
        if own.path not in _held:
            return True  # released meanwhile
        if not own.is_folder_gone():
            return False
    folder = own.path.parent
    with contextlib.suppress(OSError):
        if folder.is_dir():
            if owner_of(folder) is not None:
                return False
            own.raise_again()
    return True
