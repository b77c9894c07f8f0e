"""Processes that make the items of a stream ahead of time, in order: one DataLoader for as long as the stream lasts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.data import DataLoader

from trainer.data.decode import BadImage


def _as_it_is(item):
    return item


def items_of(
    stream, keys: Iterable, num_workers: int, device: str, packed: Callable = _as_it_is, stays: bool = False
) -> DataLoader:
    """stream[key] for every key, in order, made by so many processes, or by this one with none; pinned where the device is a GPU.

    packed: what a process makes of an item before it is sent. stays: do the processes wait for the keys to be gone through
    again?
    """
    return DataLoader(
        stream,
        sampler=keys,
        batch_size=None,
        collate_fn=packed,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        persistent_workers=stays and num_workers > 0,
        pin_memory=device.startswith("cuda"),
        generator=torch.Generator(),  # else the loader's base seed would move torch's own generator
    )


def whole(items: Iterable) -> Iterator:
    """The same items. Raises the first BadImage among them."""
    for item in items:
        if isinstance(item, BadImage):
            raise item
        yield item


def _start_worker(number: int) -> None:
    """A signal to the whole process group is the main process's to answer: it saves, and its end ends the workers."""
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
