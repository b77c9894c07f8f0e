"""Worker processes that make the items of a stream ahead of time, in order.

An item is a pure function of its key, so what a process did not deliver, because it was killed,
could not be started or could not read its files, another one delivers: the same bytes.
"""

from __future__ import annotations

import contextlib
import gc
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from trainer.base.disk import why
from trainer.base.memory import hand_back_freed_memory, is_memory_full
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
    stream, keys: Iterable, workers: int | Started, device: str, watch: Watch = Watch()
) -> Iterator:
    """stream[key] for every key, in order; in pinned memory where the device is a GPU.

    workers: the number of processes that make them and end with them; with none, this one does. Or
    processes that were started with this stream, and stay.

    Items that cannot be read are tried again for RETRY_FOR_S; a process that is killed is replaced
    once for the same item.

    Raises DataTrouble, and what watch.check raises.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(workers, int):
            workers = Started(stack.enter_context(Pool([stream], workers, watch.say)), 0)
        of = _Pass(workers, watch)
        stack.callback(of.end)
        here = ((key, _made(stream, key)) for key in keys)
        made = of.items(iter(keys)) if workers.pool.workers else here
        tried = (_tried_again(stream, key, item, watch) for key, item in made)
        yield from _pinned(tried, of.is_ready, device) if device.startswith("cuda") else tried


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
    """One process. due: (pass, key) that it was asked for, the first one next. arrived: (pass,
    item) that came while another pass's was awaited. died_at: the first that was due when the
    process before this one died, which has made nothing since.
    """

    number: int
    process: Any
    socket: socket.socket
    due: deque = field(default_factory=deque)
    arrived: deque = field(default_factory=deque)
    died_at: Any = None


class Pool:
    """Processes that make the items of some streams, ended with the block, or with this program
    whatever ends it.

    They sleep where no item is asked for. Whatever this program overwrites after it has started
    them they hold a copy of (copy-on-write): so the earlier the smaller.
    """

    def __init__(self, streams: Sequence, num_workers: int, say: Callable[[str], None]) -> None:
        self.streams, self._say = tuple(streams), say
        self._num_workers = num_that_fit(num_workers, say)
        self.workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        # Before the first is started: they ignore SIGTERM (see _start_worker), with which
        # multiprocessing would end them at exit before it joins them, and hang. By a hook of its
        # own, which its child processes (an ablation's cells) have too, where atexit has none.
        self._at_exit = Finalize(None, self._end, exitpriority=1)
        if self._num_workers:
            hand_back_freed_memory()
        try:
            for number in range(self._num_workers):
                self.workers.append(_Worker(number, *self._started()))
        except OSError as error:
            self._say(
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

    def ask(self, worker: _Worker, of: _Pass, key: Any) -> None:
        """Ask a process for an item of a pass."""
        worker.due.append((of, key))
        with contextlib.suppress(OSError):  # it is found dead where its item is awaited
            send(worker.socket, (of.number, key))

    def item(self, worker: _Worker, of: _Pass) -> Any:
        """The next item of a pass that a process was asked for. Those of other passes that come
        before it wait for their turn.
        """
        for place, (owner, item) in enumerate(worker.arrived):
            if owner is of:
                del worker.arrived[place]
                return item
        while True:
            item = self._received(worker, of.watch)
            owner, _ = worker.due.popleft()
            worker.died_at = None
            if owner is of:
                return item
            if not owner.is_over:
                worker.arrived.append((owner, item))

    def _received(self, worker: _Worker, watch: Watch) -> Any:
        """What a process owes first."""
        while True:
            try:
                item = receive(worker.socket, watch.check)
            except LostMemory:
                owner, key = worker.due[0]
                return _made(self.streams[owner.number], key)
            except (EOFError, ConnectionError):
                self._replace(worker, watch)
                continue
            if isinstance(item, _Failed):
                item.error.add_note(f"in loader process {worker.number + 1}:\n{item.trace}")
                raise item.error
            return item

    def _replace(self, worker: _Worker, watch: Watch) -> None:
        """Start a process in a dead one's place, for the items that it owes. Raises DataTrouble
        where the one before died over the same item.
        """
        worker.process.join(_LOOK_S)
        death = (
            f"loader process {worker.number + 1} of {len(self.workers)} (process"
            f" {worker.process.pid}) {_death(worker.process.exitcode)}"
        )
        worker.socket.close()
        if worker.died_at is not None and worker.died_at is worker.due[0]:
            raise DataTrouble(f"the end of a process: {death}, as the one before it")
        worker.died_at = worker.due[0]
        watch.say(f"{death}; another one makes the same images")
        hand_back_freed_memory()
        try:
            worker.process, worker.socket = self._started()
            for of, key in worker.due:
                send(worker.socket, (of.number, key))
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
            process = context.Process(target=_work, args=(theirs, self.streams), daemon=True)
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        return process, ours

    def _end(self) -> None:
        for worker in self.workers:
            worker.process.kill()


@dataclass(frozen=True)
class Started:
    """A stream of a pool's, by its number there."""

    pool: Pool
    number: int


class _Pass:
    """Items of one stream by a pool's processes in turn, beside those of other passes. is_over:
    what still comes for it is dropped.
    """

    def __init__(self, started: Started, watch: Watch) -> None:
        self._pool, self.number, self.watch = started.pool, started.number, watch
        self._due: deque[tuple[_Worker, Any]] = deque()  # in their order
        self.is_over = False

    def items(self, keys: Iterator) -> Iterator[tuple[Any, Any]]:
        """(key, item) of each key, in order."""
        for _ in range(_AHEAD):
            for worker in self._pool.workers:
                self._ask(worker, keys)
        while self._due:
            worker, key = self._due[0]
            item = self._pool.item(worker, self)
            self._due.popleft()
            self._ask(worker, keys)
            yield key, item

    def is_ready(self) -> bool:
        """Has the next item, or the start of it, come? False where there are no processes."""
        if not self._due:
            return False
        worker, _ = self._due[0]
        return any(of is self for of, _ in worker.arrived) or bool(wait([worker.socket], 0))

    def end(self) -> None:
        """No further item is wanted."""
        self.is_over = True
        for worker, _ in self._due:
            worker.arrived = deque(each for each in worker.arrived if each[0] is not self)

    def _ask(self, worker: _Worker, keys: Iterator) -> None:
        for key in itertools.islice(keys, 1):
            self._due.append((worker, key))
            self._pool.ask(worker, self, key)


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


def _work(socket_: socket.socket, streams: Sequence) -> None:
    """Make the items that are asked for, until nobody asks any more."""
    _start_worker()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, key = receive(socket_)
            try:
                item = _made(streams[number], key)
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
    gc.freeze()  # a collection writes to each object that it looks at, and so copies its page
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
