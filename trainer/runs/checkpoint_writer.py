"""Checkpoints are written beside the training: a copy of the state is, by one thread at a time."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.base.disk import RETRY_S
from trainer.runs.checkpoint import save_checkpoint


class Saver:
    """Writes the checkpoints of one run into a folder, one after the other; of a failed one the
    state is let go.

    every_s: least seconds between two; 0: one after every step, which waits for it. last_step: of
    the newest that is on the disk, None before the first. error: why the last one is not. A
    context, at whose end nothing is being written.
    """

    def __init__(
        self, folder: Path, every_s: float, before_write: Callable[[Path], None] | None = None
    ) -> None:
        self.folder, self.every_s, self._before_write = folder, every_s, before_write
        self.last_step: int | None = None
        self.error: OSError | None = None
        self._thread: threading.Thread | None = None
        self._bug: BaseException | None = None
        self._begun_s = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception) -> None:
        if self._thread is not None:
            self._thread.join()

    def is_due(self) -> bool:
        """Is it time for a checkpoint, and nobody writing one? After a failure it is time
        sooner.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        wait_s = self.every_s if self.error is None else min(self.every_s, RETRY_S)
        return time.monotonic() - self._begun_s >= wait_s

    def start(
        self, step: int, state: dict, before: Callable[[], None], is_kept: bool = False
    ) -> None:
        """Copy the state after `step` steps and begin to write it; `before` is called first, by the
        thread.

        Waits for the checkpoint before it.
        """
        self.wait()
        self._begun_s = time.monotonic()
        copied, is_copied = copied_state(state)
        self._thread = threading.Thread(
            target=self._write,
            args=(step, [copied], is_copied, before, is_kept),
            name="saver",
            daemon=True,
        )
        del copied  # the thread alone holds it
        self._thread.start()
        if self.every_s == 0:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what was no error of the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug

    def _write(
        self,
        step: int,
        held: list[dict],
        is_copied: Callable[[], None],
        before: Callable[[], None],
        is_kept: bool,
    ) -> None:
        try:
            is_copied()
            before()
            save_checkpoint(self.folder, step, held.pop(), is_kept, self._before_write)
            self.last_step, self.error = step, None
        except OSError as error:
            self.error = error.with_traceback(None)  # which would hold the copy
        except BaseException as error:
            self._bug = error


def copied_state(state: dict) -> tuple[dict, Callable[[], None]]:
    """A copy of a state on the CPU, and what waits until it is whole.

    From a GPU it is copied into pinned memory in the order of its own work: no step waits for it,
    and the next one changes the weights after they were copied.
    """
    devices: set[torch.device] = set()
    made = _copied(state, devices)
    events = []
    for device in devices:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)

    def wait() -> None:
        for event in events:
            event.synchronize()

    return made, wait


def _copied(value, devices: set[torch.device]):
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.device.type != "cuda":
            return value.clone() if value.device.type == "cpu" else value.cpu()
        devices.add(value.device)
        try:
            made = torch.empty_like(value, device="cpu", pin_memory=True)
        except (
            RuntimeError
        ):  # memory that may not be paged out is scarce here: the step waits for this one
            return value.cpu()
        return made.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        made = copy.copy(value)  # an OrderedDict of torch's carries the versions of its modules
        for key, item in value.items():
            made[key] = _copied(item, devices)
        return made
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, devices) for item in value)
    return value
