"""Fault injection, `inject=kill@37,nan@50`: a run's promises can be tested on any machine.

Each fault is injected once per run folder: the file `injected` there names it beforehand, so that
the same command resumes past it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.base.errors import UserError, did_you_mean
from trainer.data.faulty import Fault, FaultyStream
from trainer.distributed.communicator import Ranks

# What a fault may change in the row: nothing (a later process makes up for it), its speed, or its
# result.
KINDS = {
    "kill": "nothing",
    "term": "nothing",
    "raise": "nothing",
    "enospc": "nothing",
    "slow": "speed",
    "nan": "result",
    "oom": "result",
    "bad_image": "result",
}
IN_LOADER = ("slow", "bad_image")
_MARKS = "injected"
_WRITTEN = re.compile(r"([a-z_]+)@([1-9][0-9]{0,14})(?::([0-9]{1,6}(?:\.[0-9]{1,6})?)s)?")
_EXAMPLE = "inject=kill@37,slow@5:3s"


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of `inject=`: kind@number, for some with :seconds, commas between.

    Raises UserError for anything else.
    """
    faults = tuple(_parsed(word.strip()) for word in text.split(",")) if text.strip() else ()
    for fault in faults:
        if faults.count(fault) > 1:
            raise UserError(
                f"inject={fault}: given twice, but injected once per run; use another number"
            )
    return faults


def _parsed(word: str) -> Fault:
    kind = word.partition("@")[0]
    if kind not in KINDS:
        hint, valid = did_you_mean(kind, KINDS), ", ".join(KINDS)
        raise UserError(f"inject={word}: unknown{hint}; valid: {valid}, as in {_EXAMPLE}")
    found = _WRITTEN.fullmatch(word)
    what = "the number of an image" if kind == "bad_image" else "the number of a step"
    if found is None:
        raise UserError(f"inject={word}: needs {what}, counted from 1; use {_EXAMPLE}")
    if kind == "slow" and not float(found[3] or 0):
        raise UserError(f"inject={word}: needs a duration in seconds; use slow@{found[2]}:3s")
    if found[3] is not None and kind not in ("slow", "enospc"):
        raise UserError(f"inject={word}: {kind} has no duration; use {kind}@{found[2]}")
    return Fault(kind, int(found[2]), float(found[3] or 0))


def check_faults(faults: Iterable[Fault], plan) -> None:
    """Refuse a fault that a plan never reaches. Raises UserError."""
    for fault in faults:
        num, what = plan.num_steps, "steps"
        if fault.kind == "bad_image":
            num, what = plan.draws_per_epoch * plan.recipe.epochs, "images"
        if fault.number > num:
            use = f"{fault.kind}@{num} at most"
            raise UserError(f"inject={fault}: the run has {num} {what}; use {use}")


def step_of(fault: Fault, plan) -> int:
    """The step, counted from 0, in which a fault is injected."""
    if fault.kind != "bad_image":
        return fault.number - 1
    epoch, place = divmod(fault.number - 1, plan.draws_per_epoch)
    return epoch * plan.steps_per_epoch + place // plan.recipe.batch.images


@dataclass(frozen=True)
class Injection:
    """What inject= asks for; called with a run's plan and folder, it gives the faults still due."""

    faults: tuple[Fault, ...]

    def check(self, plan) -> None:
        """Refuse faults that the plan never reaches. Raises UserError."""
        check_faults(self.faults, plan)

    def __call__(self, plan, folder: Path, ranks: Ranks) -> Faults:
        """The faults that have not been injected in a run folder yet."""
        return Faults(self.faults, plan, folder, ranks)


def parse_injection(text: str) -> Injection | None:
    """inject= as a user wrote it; None for nothing. Raises UserError."""
    faults = parse_faults(text)
    return Injection(faults) if faults else None


class Faults:
    """The faults still to be injected in one run folder, the same on every rank; without any it
    costs nothing.

    A fault of one process hits the last rank that has a micro-batch in the step; a full disk,
    rank 0.

    disk: asked by the run's writers before each write.

    Raises UserError where the file of injected faults cannot be read.
    """

    def __init__(self, faults: tuple[Fault, ...], plan, folder: Path, ranks: Ranks) -> None:
        self.disk = Disk()
        self.plan, self.ranks, self._path = plan, ranks, Path(folder) / _MARKS
        self.left = faults
        if faults:
            marks = ranks.broadcast(_marks_in(self._path) if ranks.is_first else [])
            self.left = tuple(fault for fault in faults if str(fault) not in marks)

    def in_loader(self, state) -> tuple[Fault, ...]:
        """Those injected by the dataloader, for one that starts at state.progress.step.

        A dataloader prefetches, so those of its first step are recorded now.
        """
        due = tuple(fault for fault in self.left if fault.kind in IN_LOADER)
        first = [fault for fault in due if step_of(fault, self.plan) == state.progress.step]
        struck = self._mark(first, state)
        return tuple(fault for fault in due if fault not in first or fault in struck)

    def wrap(self, state) -> Callable | None:
        """A wrapper that makes the training stream from state.progress.step on faulty; None where
        no fault of the dataloader is due.

        Raises UserError for a dataloader other than torch's.
        """
        due = self.in_loader(state)
        if not due:
            return None
        if state.settings.loader == "ffcv":
            why = "slow and bad_image need the torch dataloader; use loader=torch"
            raise UserError(f"inject=: {why}")
        facts = {"faults": due, "draws_per_epoch": self.plan.draws_per_epoch}
        return lambda stream: FaultyStream(**vars(stream), **facts)

    def before_write(self, path: Path) -> None:
        """Raises OSError while a full disk is injected."""
        self.disk.before_write(path)

    def before_step(self, step: int, state) -> None:
        """Inject what is due in a step, counted from 0; state.progress records what may change the
        row.
        """
        due = [fault for fault in self.left if step_of(fault, self.plan) == step]
        if not due:
            return
        due = self._mark(due, state, [fault for fault in due if fault.kind in IN_LOADER])
        one = self.plan.assignment(self.ranks.rank, self.ranks.world_size)
        number = self.plan.micro_batches(step)
        num_parts = one.parts_in(self.plan.window_images(step), number)
        last = min(one.num_groups, number) - 1, num_parts - 1
        is_struck = (one.group, one.part) == last  # the last rank that has images
        for fault in due:
            if fault.kind == "enospc" and self.ranks.is_first:
                self.disk.fill(fault.seconds)
            elif is_struck and fault.kind in _IN_PROCESS:
                _IN_PROCESS[fault.kind](state.model)

    def _mark(self, due: list[Fault], state, made: Sequence[Fault] = ()) -> list[Fault]:
        """Record faults in the folder; gives those to inject. made: by the dataloader already.

        Where recording fails, as on a full disk, the run continues without these faults:
        unrecorded, they would be injected again at every resume.
        """
        if not due:
            return []
        self.left = tuple(fault for fault in self.left if fault not in due)
        # a barrier: no rank continues before they are recorded
        error = self.ranks.broadcast(_marked(self._path, due) if self.ranks.is_first else "")
        struck = [fault for fault in due if not error or fault in made]
        state.progress.injected += [str(fault) for fault in struck if self._is_in_the_row(fault)]
        why = f": cannot be recorded in {self._path} ({error}), would recur at every resume"
        for fault in due:
            not_ = "" if fault in struck else "not "
            state.say(f"{not_}injected: {fault}{why if error else ''}")
        return struck

    def _is_in_the_row(self, fault: Fault) -> bool:
        # a run that fails at the image is resumed by a process that can read it
        is_undone = fault.kind == "bad_image" and self.plan.bad_images == "fail"
        return not is_undone and KINDS[fault.kind] != "nothing"


def _marks_in(path: Path) -> list[str]:
    """The faults recorded in a file, none where it does not exist. Raises UserError."""
    try:
        return path.read_text(encoding="ascii").split() if path.exists() else []
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not ASCII"
        raise UserError(
            f"{path}: cannot be read ({reason}); remove it, and all of inject= is injected again"
        ) from None


def _marked(path: Path, due: list[Fault]) -> str:
    """Append faults to a file and sync it; gives "", or why that failed."""
    num_bytes = path.stat().st_size if path.exists() else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="ascii") as file:
            file.writelines(f"{fault}\n" for fault in due)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):  # drop a partly written name
            os.truncate(path, num_bytes)
        return error.strerror or str(error)
    return ""


def _kill(model) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(model) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _raise(model) -> None:
    raise RuntimeError("internal error, injected by inject=")


def _make_nan(model) -> None:
    _in_next_forward(model, lambda logits: logits * math.nan)


def _run_out_of_memory(model) -> None:
    def act(logits):
        raise torch.OutOfMemoryError("out of memory, injected by inject=")

    _in_next_forward(model, act)


_IN_PROCESS = {
    "kill": _kill,
    "term": _terminate,
    "raise": _raise,
    "nan": _make_nan,
    "oom": _run_out_of_memory,
}


def _in_next_forward(model, act: Callable) -> None:
    def hook(module, given, logits):
        handle.remove()
        return act(logits)

    handle = model.register_forward_hook(hook)


class Disk:
    """An injected full disk: the next write fails, or every write for some seconds."""

    def __init__(self) -> None:
        self._num_writes, self._until_s = 0, -math.inf

    def fill(self, seconds: float = 0.0) -> None:
        """Be full for the next write, or for a number of seconds."""
        self._num_writes = 0 if seconds else 1
        self._until_s = time.monotonic() + seconds if seconds else -math.inf

    def before_write(self, path: Path) -> None:
        """Raises OSError where the disk is full, as the system would."""
        if self._num_writes or time.monotonic() < self._until_s:
            self._num_writes = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
