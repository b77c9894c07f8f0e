"""The local backend: each run in a fork of this process, which has imported everything and computed
nothing.

A fresh interpreter spends seconds on imports, a fork milliseconds, with the same results bit for
bit. Forking is safe as long as this process has started no threads of torch and no GPU.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch

from trainer.base.exits import EXIT_STOPPED
from trainer.base.signals import handle_signals

PRELOADED = (
    "timm", "matplotlib.figure", "sklearn.datasets", "torchvision", "torch.utils.tensorboard",
    "torch.utils.flop_counter", "trainer.runs.start", "trainer.runs.summary",
    "trainer.engine.train", "trainer.runs.export", "trainer.data.dataset", "trainer.runs.job",
)  # fmt: skip
_FORK = multiprocessing.get_context("fork")
_PARENT_POLL_S = 0.5


def preload() -> None:
    """Import what a run imports, so that forks need not."""
    for name in PRELOADED:
        importlib.import_module(name)


def count_gpus() -> int:
    """GPUs that torch sees, counted in a fork: counting may initialize CUDA, which no fork could
    use afterwards.
    """

    def count() -> Iterator[int]:
        yield torch.cuda.device_count()

    return next(streamed(count), 0)


class LocalCells:
    """At most num_slots processes; slot i sees the i-th of `gpus` alone, in turn where there are
    fewer.

    work: called in each process with the argument of `start`; its result is the exit code.
    """

    def __init__(
        self, work: Callable[..., int], num_slots: int, gpus: tuple[str, ...] = ()
    ) -> None:
        self.num_slots, self._work, self._gpus = num_slots, work, gpus
        self._running: dict[int, tuple[Any, multiprocessing.process.BaseProcess]] = {}

    @property
    def num_running(self) -> int:
        """Runs that have been started and not ended."""
        return len(self._running)

    def start(self, what) -> None:
        """Start one process; there must be a free slot."""
        slot = next(number for number in range(self.num_slots) if number not in self._running)
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        process = _FORK.Process(target=_in_fork, args=(self._work, what, gpu, os.getpid()))
        process.start()
        self._running[slot] = what, process

    def ended(self, timeout_s: float) -> list[tuple[Any, int]]:
        """The work that has ended, with exit codes, of a signal negative. Waits at most timeout_s
        for the first.
        """
        if not self._running:
            time.sleep(timeout_s)
            return []
        ready = wait([process.sentinel for _, process in self._running.values()], timeout_s)
        slots = [slot for slot, (_, process) in self._running.items() if process.sentinel in ready]
        found = []
        for slot in slots:
            what, process = self._running.pop(slot)
            process.join()
            assert process.exitcode is not None  # it has ended
            found.append((what, process.exitcode))
        return found

    def stop(self) -> None:
        """Ask every process to save and end."""
        for _, process in self._running.values():
            process.terminate()

    def streamed(self, function: Callable[..., Iterator], *given) -> Iterator:
        """The results of a generator run in a process of its own, as they come; fewer where it
        dies.
        """
        return streamed(function, *given, gpu=self._gpus[0] if self._gpus else None)

    def close(self) -> None:
        """Leave no process behind: what still runs, as after an internal error, saves and ends."""
        self.stop()
        for _, process in self._running.values():
            process.join()


def streamed(function: Callable[..., Iterator], *given, gpu: str | None = None) -> Iterator:
    """The results of a generator run in a fork, as they come; fewer where the fork dies."""
    receiver, sender = _FORK.Pipe(duplex=False)

    def work(_) -> int:
        receiver.close()
        for result in function(*given):
            sender.send(result)
        return 0

    process = _FORK.Process(target=_in_fork, args=(work, None, gpu, os.getpid()))
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        pass
    finally:
        receiver.close()
        process.terminate()
        process.join()


def _in_fork(work: Callable[..., int], what, gpu: str | None, parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the sweep's way to stop it, whoever ignores it
    for number in handle_signals(signal.SIG_DFL):  # the sweep's own way is not this process's
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the sweep stops it so, if it ignores it itself
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        sys.exit(work(what))
    except KeyboardInterrupt:
        # Ctrl-C reaches every process of a terminal; the sweep says what there is to say
        sys.exit(EXIT_STOPPED)


def _end_with(parent: int) -> None:
    """Ask this process to save and end once its parent is gone, even killed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
