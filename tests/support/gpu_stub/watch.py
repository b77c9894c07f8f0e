"""What a process asks of its pretended GPU, with the line of trainer/ that led to it."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import trainer

_library = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
_library.gpu_stub_count.restype = ctypes.c_long
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
_OURS = str(Path(trainer.__file__).parent) + os.sep

COUNTERS = (
    "launches",
    "waits",
    "pageable_copies",
    "copies_to_device",
    "copies_to_host",
    "copies_on_device",
    "memsets",
    "pinned_allocations",
    "device_allocations",
    "collectives",
    "bytes_to_device",
    "bytes_to_host",
    "bytes_on_device",
    "bytes_pinned",
    "bytes_collected",
)


def counts() -> collections.Counter[str]:
    """All counters since the process began."""
    return collections.Counter({name: _library.gpu_stub_count(name.encode()) for name in COUNTERS})


@contextlib.contextmanager
def kernels() -> Iterator[collections.Counter[str]]:
    """How often each kernel is launched inside the block, by its mangled name."""
    launched: collections.Counter[str] = collections.Counter()
    _library.gpu_stub_count_names(1)
    yield launched
    with tempfile.NamedTemporaryFile("r") as file:
        _library.gpu_stub_write_names(file.name.encode())
        for line in file:
            number, name = line.rstrip("\n").split("\t", 1)
            launched[name] += int(number)
    _library.gpu_stub_count_names(0)


def our_lines(frame: FrameType | None) -> str:
    """The innermost lines of trainer/ below a frame: "engine/train.py:120 < engine/train.py:80"."""
    lines = [
        f"{place.f_code.co_filename.removeprefix(_OURS)}:{number}"
        for place, number in traceback.walk_stack(frame)
        if place.f_code.co_filename.startswith(_OURS)
    ]
    return " < ".join(lines[:3])


def _where() -> str:
    """This thread's lines; autograd's threads have none: then what the main thread waits in."""
    frame = sys._getframe()
    main = sys._current_frames().get(threading.main_thread().ident)
    return our_lines(frame) or our_lines(main) or "no line of trainer/"


class Watch:
    """A context in which every call is noted that makes the host wait, copies memory that is not
    pinned, or overwrites pinned memory on its way.

    found: (what, line) -> how often. collectives: NCCL's calls in their order, (what, bytes, line).
    """

    def __init__(self) -> None:
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()
        self.collectives: list[tuple[str, int, str]] = []
        self._callback = _Callback(self._told)

    def _told(self, what: bytes, num_bytes: int) -> None:
        name = what.decode()
        if name.startswith("nccl"):
            self.collectives.append((name, num_bytes, _where()))
        else:
            self.found[name, _where()] += 1

    def __enter__(self) -> Watch:
        _library.gpu_stub_watch(self._callback)
        return self

    def __exit__(self, *exception) -> None:
        _library.gpu_stub_watch(_Callback())
