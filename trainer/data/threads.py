"""Work of torch's on the items of a stream, in threads beside the one that takes them, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier

import torch

from trainer.data.workers import ended

_AHEAD = 1  # items that wait for a thread, beside those that have one


def in_threads(work: Callable, items: Iterable, num_threads: int) -> Iterator:
    """work(item) of each item, in order: so many at a time, with one of torch's own threads each.

    What an item raises, or the work on it, is raised where it is due. Ending early ends the items
    too.
    """
    items, due = iter(items), deque()
    with pool_of(num_threads) as pool, ended(items):
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
    """The work on the next item; None where there is no further one."""
    try:
        return pool.submit(work, next(items))
    except StopIteration:
        return None
    except Exception as error:
        failed = Future()
        failed.set_exception(error)
        return failed


def pool_of(num_threads: int) -> ThreadPoolExecutor:
    """So many threads, for each of which torch has one; the thread that asks keeps its number."""
    own, together = torch.get_num_threads(), Barrier(num_threads)

    def begin() -> None:
        torch.get_num_threads()  # gives a new thread the number that was set last, once
        torch.set_num_threads(1)
        together.wait()

    pool = ThreadPoolExecutor(num_threads, "augment", begin)
    try:
        for begun in [pool.submit(int) for _ in range(num_threads)]:
            begun.result()
    except (
        BaseException
    ):  # the machine gives no further thread: those that wait for it must not wait for ever
        together.abort()
        pool.shutdown()
        raise
    torch.set_num_threads(
        own
    )  # also the number of threads to come, which begin with the last one set
    return pool
