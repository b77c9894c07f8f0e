"""What training asks of the run that it belongs to, answered by one that keeps nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from trainer.base.signals import StopRequest
from trainer.data.workers import Watch


class NullLogger:
    """A logger that writes nothing: of a training that nobody reads, and of all ranks but the
    first.
    """

    unwritten: bytes | None = None

    def __enter__(self) -> NullLogger:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def metrics_written(self) -> tuple[int, str | None]:
        return 0, None

    def sync(self) -> None:
        pass

    def trouble(self, *what) -> None:
        pass

    def say(self, line: str, style: str | None = None) -> None:
        pass

    def window(self, *values) -> None:
        pass

    def scores(self, *values) -> None:
        pass

    def picture(self, *what) -> None:
        pass


class NullRun:
    """A run without a folder: nothing is resumed, logged, saved or injected, and no signal stops
    it.

    All that `train` calls is here, so that it needs no other; trainer.runs.run.Run is the one
    that writes.

    stop: the signals that ask for the end. logger: where lines and curves go.
    """

    def __init__(self) -> None:
        self.stop = StopRequest()
        self.logger = NullLogger()

    @property
    def watch(self) -> Watch:
        """What is asked, and said, while images are awaited, on this rank alone."""
        return Watch(self.check, self.logger.say)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """The block that trains: it begins with the state of the newest checkpoint, and ends with
        all files closed.
        """
        yield

    def loader_faults(self) -> Callable | None:
        """What makes the training stream a faulty one, for tests of what a run promises; None
        leaves it.
        """
        return None

    def start_step(self, step: int) -> None:
        """Before every optimizer step, on every rank. Raises Stopped once a signal has come to any
        of them.
        """

    def check(self) -> None:
        """Between two batches of an evaluation, on this rank alone. Raises Stopped once a signal
        has come to it.
        """
        self.stop.check()

    def first_batch(self, loader: Iterator, classes: Sequence[str]) -> Iterator:
        """Look at the first micro-batch of a fresh run; gives the loader with that in front."""
        return loader

    def evaluated(self) -> None:
        """After every evaluation, on every rank. Raises Stopped on all of them for a run that is
        not worth its time any longer.
        """

    def ends_early(self) -> bool:
        """Has the recipe's early_stopping ended it, after the last evaluation?"""
        return False

    def save_if_due(self) -> None:
        """After every step: begin a checkpoint where it is time for one."""

    def save(self) -> None:
        """Have the last checkpoint written before continuing."""

    def stopped(self, signal_name: BaseException) -> None:
        """After a signal: save and say so."""
