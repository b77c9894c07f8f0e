"""What a process asks of its pretended GPU, with the line of trainer/ that led to it."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import os
import select
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
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
    pinned, or overwrites pinned memory on its way; an error that ends it too, and every process
    started.

    found: (what, line) -> how often. collectives: NCCL's calls in their order, (what, bytes, line).
    processes: the line that started each, by its id.
    """

    def __init__(self) -> None:
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()
        self.collectives: list[tuple[str, int, str]] = []
        self.processes: dict[int, str] = {}
        self._callback = _Callback(self._told)

    def _told(self, what: bytes, num_bytes: int) -> None:
        name = what.decode()
        if name.startswith("nccl"):
            self.collectives.append((name, num_bytes, _where()))
        else:
            self.found[name, _where()] += 1

    def __enter__(self) -> Watch:
        _library.gpu_stub_watch(self._callback)
        self._start = start = BaseProcess.start

        def started(process: BaseProcess) -> None:
            start(process)
            self.processes[process.pid] = _where()

        BaseProcess.start = started
        return self

    def __exit__(self, kind, error, trace) -> None:
        BaseProcess.start = self._start
        _library.gpu_stub_watch(_Callback())
        if error is not None:
            frames = [frame for frame, _ in traceback.walk_tb(trace)]
            self.found[f"{kind.__name__}: {error}", our_lines(frames[-1])] += 1


def unmatched(of_ranks: list[list[tuple[str, int, str]]]) -> str:
    """The first collective of one rank that another does not take part in, with its line; "" where
    all do the same. On GPUs they would wait for ever.
    """
    for number, calls in enumerate(itertools.zip_longest(*of_ranks)):
        if len({call and call[:2] for call in calls}) > 1:
            return "; ".join(
                f"collective {number} of rank {rank}: "
                + (f"{call[0]} of {call[1]} bytes, {call[2]}" if call else "none")
                for rank, call in enumerate(calls)
            )
    return ""


def left_over(processes: dict[int, str], within_s: float) -> dict[int, str]:
    """Those of a watch's processes that still run, once their parent is gone for so long."""
    found = {}
    until_s = time.monotonic() + within_s
    for number, line in processes.items():
        try:
            handle = os.pidfd_open(number)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([handle], [], [], max(0.0, until_s - time.monotonic()))
        os.close(handle)
        if not ended:
            found[number] = line
    return found
