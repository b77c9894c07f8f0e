"""Worker processes that make the items of a stream ahead of time, in order: one DataLoader for the
whole stream.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

from trainer.data.decode import BadImage


def _as_it_is(item):
    return item


def items_of(
    stream, keys: Iterable, num_workers: int, device: str, packed: Callable = _as_it_is
) -> DataLoader:
    """stream[key] for every key, in order, made by num_workers processes, or in this one with none;
    in pinned memory where the device is a GPU.

    packed: applied to each item in its worker, before it is sent.
    """
    return _Loader(
        stream,
        sampler=keys,
        batch_size=None,
        collate_fn=packed,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=device.startswith("cuda"),
        # its own, else it would take its base seed from torch's global generator
        generator=torch.Generator(),
        multiprocessing_context=_noting_context() if num_workers else None,
    )


class _Loader(DataLoader):
    """A DataLoader whose workers never block the exit of this process."""

    def __iter__(self) -> Iterator:
        if not self.num_workers:
            return super().__iter__()
        started = self.multiprocessing_context.started = []
        items = super().__iter__()
        # The workers ignore SIGTERM (see _start_worker), with which multiprocessing would end them
        # at exit before it joins them: where an error's traceback still holds the loader at that
        # time, the process would hang. The hook registered last runs first, before those of torch
        # and multiprocessing.
        end = functools.partial(_kill, started)
        atexit.register(end)
        return _with_end(items, end)


def _with_end(items: Iterator, end: Callable[[], None]) -> Iterator:
    try:
        yield from items
    finally:
        atexit.unregister(end)


def _kill(processes: list) -> None:
    for process in processes:
        process.kill()


def _noting_context():
    """A multiprocessing context with the current start method that records its processes in
    `started`.
    """
    # get_context() without a name would fix the start method for the importing program, which may
    # still choose another.
    name = (
        multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0]
    )

    class Noting(type(multiprocessing.get_context(name))):
        def Process(self, *given, **named):
            process = super().Process(*given, **named)
            self.started.append(process)
            return process

    return Noting()


def whole(items: Iterable) -> Iterator:
    """The same items. Raises the first BadImage among them."""
    with closing(items):
        for item in items:
            if isinstance(item, BadImage):
                raise item
            yield item


@contextmanager
def closing(items: Iterable) -> Iterator[None]:
    """Close the iterator at the end of the block, not when it is garbage-collected: it may have
    threads.
    """
    try:
        yield
    finally:
        if hasattr(items, "close"):
            items.close()


def _start_worker(number: int) -> None:
    """Set up a worker. It ignores signals sent to the process group: the main process handles them,
    saves, and ends its workers.
    """
    torch.set_num_threads(1)
    ignore_advice_about_files()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def ignore_advice_about_files() -> None:
    """Silence PIL's warnings (palettes, EXIF, size) in this process, which must be our worker:
    check-data lists such files.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
