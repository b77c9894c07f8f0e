"""Processes that make the items of a stream ahead of time, in order: one DataLoader for as long as the stream lasts."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
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
    """stream[key] for every key, in order, made by so many processes, or by this one with none; pinned where the device is a GPU.

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
    )


class _Loader(DataLoader):
    """A DataLoader whose processes never hold up the end of this one."""

    def __iter__(self):
        items = super().__iter__()
        # The last one registered is the first one called: before torch and multiprocessing ask these processes to end, which
        # they do not hear (see _start_worker), and wait, where an error's traceback still holds the loader.
        atexit.unregister(_end_processes)
        atexit.register(_end_processes)
        return items


def _end_processes() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:  # multiprocessing would end them now
            process.kill()


def whole(items: Iterable) -> Iterator:
    """The same items. Raises the first BadImage among them."""
    with ended(items):
        for item in items:
            if isinstance(item, BadImage):
                raise item
            yield item


@contextmanager
def ended(items: Iterable) -> Iterator[None]:
    """Whatever makes items ends with whoever takes them, not when it is forgotten: a generator may have threads."""
    try:
        yield
    finally:
        if hasattr(items, "close"):
            items.close()


def _start_worker(number: int) -> None:
    """A signal to the whole process group is the main process's to answer: it saves, and its end ends the workers."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
