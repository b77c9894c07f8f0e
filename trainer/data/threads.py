"""A map over an iterator with a pool of threads, for torch operations; results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import torch

_AHEAD = 1  # items queued beyond the number of threads


def map_in_threads(work: Callable, items: Iterable, num_threads: int) -> Iterator:
    """work(item) of each item, in order: num_threads at a time, each with one torch thread.

    An exception of an item, or of its work, is raised when that item's turn comes. Closing this
    generator closes the items too.
    """
    items, due = iter(items), deque()
    with thread_pool(num_threads) as pool, closing(items):
        try:
            while True:
                while len(due) < num_threads + _AHEAD and (begun := _begun(pool, work, items)):
                    due.append(begun)
                if not due:
                    return
                yield due.popleft().result()
        finally:
            for later in due:
                later.cancel()


def _begun(pool: ThreadPoolExecutor, work: Callable, items: Iterator) -> Future | None:
    """The future of the next item; None at the end."""
    try:
        return pool.submit(work, next(items))
    except StopIteration:
        return None
    except Exception as error:
        failed = Future()
        failed.set_exception(error)
        return failed


def thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads with one torch thread each; the calling thread keeps its number."""
    own, together = torch.get_num_threads(), Barrier(num_threads)

    def begin() -> None:
        # a thread's first call resets its number to the last one set anywhere: so call it first
        torch.get_num_threads()
        torch.set_num_threads(1)
        together.wait()

    pool = ThreadPoolExecutor(num_threads, "augment", begin)
    try:
        for begun in [pool.submit(int) for _ in range(num_threads)]:
            begun.result()
    except BaseException:  # no further thread could start: release those at the barrier
        together.abort()
        pool.shutdown()
        raise
    torch.set_num_threads(own)  # new threads start with the last number set, so set it back
    return pool


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
