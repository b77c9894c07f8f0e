"""Worker processes that make the items of a stream ahead of time, in order.

An item is a pure function of its key, so what a process did not deliver, because it was killed,
could not be started or could not read its files, another one delivers: the same bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from trainer.base.disk import why
from trainer.base.memory import is_memory_full
from trainer.base.signals import SIGNALS
from trainer.data.decode import BadImage, DataTrouble
from trainer.data.messages import LostMemory, receive, send
from trainer.data.threads import closing, thread_pool

RETRY_FOR_S = 60.0  # how long an item that cannot be read is tried again
_RETRY_S = 1.0
_LOOK_S = 0.5  # between two looks for a signal while an item is awaited
_AHEAD = 2  # items that a process is asked for beyond the one taken last
# Open files that the rest of a run needs: checkpoints, logs, packed images, imports.
_OTHER_FILES = 24
_FILES_EACH = 3 + _AHEAD  # of a process: its socket and multiprocessing's pipes; its items' memory


def _print_note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Watch:
    """Whoever waits for items. check: called twice a second meanwhile, raises Stopped once a signal
    has come. say: one line for the reader.
    """

    check: Callable[[], None] = lambda: None
    say: Callable[[str], None] = _print_note


def items_of(
    stream, keys: Iterable, num_workers: int, device: str, watch: Watch = Watch()
) -> Iterator:
    """stream[key] for every key, in order, made by num_workers processes, or in this one with none;
    in pinned memory where the device is a GPU.

    Items that cannot be read are tried again for RETRY_FOR_S; a process that is killed is replaced
    once for the same item.

    Raises DataTrouble, and what watch.check raises.
    """
    with _Pool(stream, num_that_fit(num_workers, watch.say), watch) as pool:
        here = ((key, _made(stream, key)) for key in keys)
        made = pool.items(iter(keys)) if pool.workers else here
        tried = (_tried_again(stream, key, item, watch) for key, item in made)
        yield from _pinned(tried, pool.is_ready, device) if device.startswith("cuda") else tried


def whole(items: Iterable) -> Iterator:
    """The same items. Raises the first BadImage among them."""
    with closing(items):
        for item in items:
            if isinstance(item, BadImage):
                raise item
            yield item


def num_that_fit(num_workers: int, say: Callable[[str], None]) -> int:
    """How many of the processes leave this one enough open files (ulimit -n)."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY or not os.path.isdir("/dev/fd"):
        return num_workers
    room = most - len(os.listdir("/dev/fd")) - _OTHER_FILES
    fit = max(0, min(num_workers, room // _FILES_EACH))
    if fit < num_workers:
        say(f"ulimit -n {most} leaves room for {fit} of {num_workers} loader processes")
    return fit


@dataclass
class _Worker:
    """One process. due: keys that it was asked for, the first one next. died_at: the key that was
    due when the process before this one died.
    """

    number: int
    process: Any
    socket: socket.socket
    due: deque = field(default_factory=deque)
    died_at: Any = None


class _Pool:
    """Processes over a stream, ended with the block, or with this program whatever ends it."""

    def __init__(self, stream, num_workers: int, watch: Watch) -> None:
        self.stream, self._num_workers, self._watch = stream, num_workers, watch
        self.workers: list[_Worker] = []
        self._next = 0  # whose turn it is

    def __enter__(self) -> _Pool:
        # Before the first is started: they ignore SIGTERM (see _start_worker), with which
        # multiprocessing would end them at exit before it joins them, and hang. By a hook of its
        # own, which its child processes (an ablation's cells) have too, where atexit has none.
        self._at_exit = Finalize(None, self._end, exitpriority=1)
        try:
            for number in range(self._num_workers):
                self.workers.append(_Worker(number, *self._started()))
        except OSError as error:
            self._watch.say(
                f"loader process {len(self.workers) + 1} of {self._num_workers} cannot be started"
                f" ({why(error)}); continuing with {len(self.workers) or 'this process alone'}"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self._at_exit()
        for worker in self.workers:
            worker.process.join()
            worker.socket.close()

    def items(self, keys: Iterator) -> Iterator[tuple[Any, Any]]:
        """(key, item) of each key, in order: from the processes in turn."""
        for _ in range(_AHEAD):
            for worker in self.workers:
                self._ask(worker, keys)
        for worker in itertools.cycle(self.workers):
            if not worker.due:
                return
            self._next = (worker.number + 1) % len(self.workers)
            item = self._received(worker)
            key = worker.due.popleft()
            self._ask(worker, keys)
            yield key, item

    def is_ready(self) -> bool:
        """Has the next item, or the start of it, come? False where there are no processes."""
        turn = [worker.socket for worker in self.workers[self._next : self._next + 1]]
        return bool(turn) and bool(wait(turn, 0))

    def _ask(self, worker: _Worker, keys: Iterator) -> None:
        for key in itertools.islice(keys, 1):
            worker.due.append(key)
            with contextlib.suppress(OSError):  # it is found dead where its item is awaited
                send(worker.socket, key)

    def _received(self, worker: _Worker) -> Any:
        while True:
            try:
                item = receive(worker.socket, self._watch.check)
            except LostMemory:
                return _made(self.stream, worker.due[0])
            except (EOFError, ConnectionError):
                self._replace(worker)
                continue
            if isinstance(item, _Failed):
                item.error.add_note(f"in loader process {worker.number + 1}:\n{item.trace}")
                raise item.error
            return item

    def _replace(self, worker: _Worker) -> None:
        """Start a process in a dead one's place, for the items that it owes. Raises DataTrouble
        where the one before died over the same item.
        """
        worker.process.join(_LOOK_S)
        death = (
            f"loader process {worker.number + 1} of {len(self.workers)} (process"
            f" {worker.process.pid}) {_death(worker.process.exitcode)}"
        )
        worker.socket.close()
        if worker.died_at is not None and worker.died_at == worker.due[0]:
            raise DataTrouble(f"the end of a process: {death}, as the one before it")
        worker.died_at = worker.due[0]
        self._watch.say(f"{death}; another one makes the same images")
        try:
            worker.process, worker.socket = self._started()
            for key in worker.due:
                send(worker.socket, key)
        except OSError as error:
            raise DataTrouble(f"the end of a process: {death}; {why(error)}") from None

    def _started(self) -> tuple[Any, socket.socket]:
        # get_context() without a name would fix the start method for the importing program, which
        # may still choose another.
        name = multiprocessing.get_start_method(allow_none=True)
        context = multiprocessing.get_context(name or multiprocessing.get_all_start_methods()[0])
        ours, theirs = socket.socketpair()
        ours.settimeout(_LOOK_S)
        with theirs:  # else a dead process's end would stay open here
            process = context.Process(target=_work, args=(theirs, self.stream), daemon=True)
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        return process, ours

    def _end(self) -> None:
        for worker in self.workers:
            worker.process.kill()


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"has ended with code {code}"
    name = signal.Signals(-code).name
    reason = {"SIGKILL": ": out of memory, or by hand", "SIGBUS": ": out of memory"}.get(name, "")
    return f"was ended by {name}{reason}"


@dataclass(frozen=True)
class _Failed:
    """An error of the program's own in a worker: an item would be no place for it."""

    error: Exception
    trace: str


def _work(socket_: socket.socket, stream) -> None:
    """Make the items that are asked for, until nobody asks any more."""
    _start_worker()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            key = receive(socket_)
            try:
                item = _made(stream, key)
            except Exception as error:
                item = _Failed(error, traceback.format_exc())
            send(socket_, item)


def _made(stream, key) -> Any:
    """stream[key], or the DataTrouble that kept it from being made."""
    try:
        return stream[key]
    except DataTrouble as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or is_memory_full(error)):
            raise
        return DataTrouble("unreadable data (not enough memory for the images)")


def _tried_again(stream, key, item, watch: Watch) -> Any:
    """An item; what could not be read is made once more in this process, until it is there. Raises
    DataTrouble after RETRY_FOR_S.
    """
    until_s = None
    while isinstance(item, DataTrouble):
        if until_s is None:
            until_s = time.monotonic() + RETRY_FOR_S
            watch.say(f"{item}; trying again for {RETRY_FOR_S:g} s")
        if time.monotonic() >= until_s:
            raise item
        watch.check()
        time.sleep(_RETRY_S)
        item = _made(stream, key)
    return item


def _pinned(items: Iterator, is_ready: Callable[[], bool], device: str) -> Iterator:
    """The same items in pinned memory, copied there by a thread: the next one as well, if it has
    come already.
    """
    due: deque[Future] = deque()
    # "cuda" is the one that is chosen here, which a thread has to be told
    gpu = torch.device(device if ":" in device else f"cuda:{torch.cuda.current_device()}")
    with thread_pool(1) as pool, closing(items):
        while True:
            while not due or (len(due) < 2 and is_ready()):
                for item in itertools.islice(items, 1):
                    due.append(pool.submit(_pin, item, gpu))
                    break
                else:
                    break
            if not due:
                return
            yield due.popleft().result()


def _pin(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        torch.cuda.set_device(device)  # a thread begins with the first
        return item.pin_memory()
    if isinstance(item, tuple):
        pinned = (_pin(part, device) for part in item)
        return type(item)(*pinned) if hasattr(item, "_fields") else tuple(pinned)
    if isinstance(item, dict):
        return {name: _pin(part, device) for name, part in item.items()}
    return item


def _start_worker() -> None:
    """Set up a worker. It ignores signals sent to the process group: the main process handles them,
    saves, and ends its workers.
    """
    torch.set_num_threads(1)
    ignore_advice_about_files()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once the one that asked for it is gone, even killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(0)


def ignore_advice_about_files() -> None:
    """Silence PIL's warnings (palettes, EXIF, size) in this process, which must be our worker:
    check-data lists such files.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
