"""Processes that make the items of a stream ahead of time, in order: one DataLoader for as long as
the stream lasts.
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
    """stream[key] for every key, in order, made by so many processes, or by this one with none;
    pinned where the device is a GPU.

    packed: what a process makes of an item before it is sent.
    """
    return _Loader(
        stream,
        sampler=keys,
        batch_size=None,
        collate_fn=packed,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=device.startswith("cuda"),
        generator=torch.Generator(),  # else the loader's base seed would move torch's own generator
        multiprocessing_context=_noting_context() if num_workers else None,
    )


class _Loader(DataLoader):
    """A DataLoader whose processes never hold up the end of this one."""

    def __iter__(self) -> Iterator:
        if not self.num_workers:
            return super().__iter__()
        started = self.multiprocessing_context.started = []
        items = super().__iter__()
        # They do not hear what multiprocessing would end them with (see _start_worker), and it
        # waits for them: where an error's traceback still holds the loader at the end of the
        # program, that end would not come. The hook that is registered last runs first, before
        # those of torch and multiprocessing.
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
    """A context of multiprocessing that starts processes as this program does, and keeps them in
    `started`.
    """
    # By its name: to ask for "the" context would settle it for whoever imports us, who may yet
    # choose another.
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
    with ended(items):
        for item in items:
            if isinstance(item, BadImage):
                raise item
            yield item


@contextmanager
def ended(items: Iterable) -> Iterator[None]:
    """Whatever makes items ends with whoever takes them, not when it is forgotten: a generator may
    have threads.
    """
    try:
        yield
    finally:
        if hasattr(items, "close"):
            items.close()


def _start_worker(number: int) -> None:
    """A signal to the whole process group is the main process's to answer: it saves, and its end
    ends the workers.
    """
    torch.set_num_threads(1)
    ignore_advice_about_files()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def ignore_advice_about_files() -> None:
    """No warnings of PIL's (palettes, EXIF, size) in this process, which must be ours: check-data
    lists such files.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
