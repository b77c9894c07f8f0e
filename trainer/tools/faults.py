"""Faults on purpose, `inject=kill@37,nan@50`: what a run promises can be tried on any machine.

Each fault strikes once in a run folder: the file `injected` there names it before it strikes, so
that the same command goes on past it.
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

from trainer.base.errors import UserError, did_you_mean
from trainer.data.faulty import Fault, FaultyStream
from trainer.distributed.communicator import Ranks

# What a fault touches of a row: nothing that a later process does not mend, its speed, or its
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
                f"inject={fault}: given twice, and strikes once in a run folder; use another number"
            )
    return faults


def _parsed(word: str) -> Fault:
    kind = word.partition("@")[0]
    if kind not in KINDS:
        raise UserError(
            f"inject={word}: unknown{did_you_mean(kind, KINDS)}; valid: {', '.join(KINDS)}, as in {_EXAMPLE}"
        )
    found = _WRITTEN.fullmatch(word)
    what = "the number of an image" if kind == "bad_image" else "the number of a step"
    if found is None:
        raise UserError(f"inject={word}: needs {what}, counted from 1; use {_EXAMPLE}")
    if kind == "slow" and not float(found[3] or 0):
        raise UserError(f"inject={word}: needs how many seconds; use slow@{found[2]}:3s")
    if found[3] is not None and kind not in ("slow", "enospc"):
        raise UserError(f"inject={word}: {kind} lasts no time; use {kind}@{found[2]}")
    return Fault(kind, int(found[2]), float(found[3] or 0))


def check_faults(faults: Iterable[Fault], plan) -> None:
    """Refuse a fault that would never strike in a plan. Raises UserError."""
    for fault in faults:
        num, what = (
            (plan.draws_per_epoch * plan.recipe.epochs, "images")
            if fault.kind == "bad_image"
            else (plan.num_steps, "steps")
        )
        if fault.number > num:
            raise UserError(
                f"inject={fault}: the run has {num} {what}; use {fault.kind}@{num} at most"
            )


def step_of(fault: Fault, plan) -> int:
    """The step, from 0, that a fault strikes in."""
    if fault.kind != "bad_image":
        return fault.number - 1
    epoch, place = divmod(fault.number - 1, plan.draws_per_epoch)
    return epoch * plan.steps_per_epoch + place // plan.recipe.batch.images


@dataclass(frozen=True)
class Injection:
    """What inject= asks for: checked against a run's plan, then made the faults of its folder."""

    faults: tuple[Fault, ...]

    def check(self, plan) -> None:
        """Refuse faults that would never strike. Raises UserError."""
        check_faults(self.faults, plan)

    def __call__(self, plan, folder: Path, ranks: Ranks) -> Faults:
        """The faults that are left to strike in a run folder."""
        return Faults(self.faults, plan, folder, ranks)


def parse_injection(text: str) -> Injection | None:
    """inject= as a user wrote it; None for nothing. Raises UserError."""
    faults = parse_faults(text)
    return Injection(faults) if faults else None


class Faults:
    """The faults that are still to strike in one run folder, on every rank the same; without any it
    costs nothing.

    A fault of one process strikes the last rank that has a micro-batch in the step; that of the
    disk, rank 0.

    disk: full on purpose for a while; the run's writers ask it first.

    Raises UserError where the folder's marks cannot be read.
    """

    def __init__(self, faults: tuple[Fault, ...], plan, folder: Path, ranks: Ranks) -> None:
        self.disk = Disk()
        self.plan, self.ranks, self._path = plan, ranks, Path(folder) / _MARKS
        self.left = faults
        if faults:
            marks = ranks.broadcast(_marks_in(self._path) if ranks.is_first else [])
            self.left = tuple(fault for fault in faults if str(fault) not in marks)

    def in_loader(self, state) -> tuple[Fault, ...]:
        """Those that a loader makes, for a loader that begins at state.progress.step.

        A loader works ahead: those of its first step are marked now.
        """
        due = tuple(fault for fault in self.left if fault.kind in IN_LOADER)
        first = [fault for fault in due if step_of(fault, self.plan) == state.progress.step]
        struck = self._mark(first, state)
        return tuple(fault for fault in due if fault not in first or fault in struck)

    def wrap(self, state) -> Callable | None:
        """What makes the training stream that begins at state.progress.step a faulty one, if it is
        to be.

        Raises UserError where the loader is not torch's.
        """
        due = self.in_loader(state)
        if not due:
            return None
        if state.settings.loader == "ffcv":
            raise UserError(
                "inject=: a loader's faults are made by the torch loader; use loader=torch"
            )
        return lambda stream: FaultyStream(
            **vars(stream), faults=due, draws_per_epoch=self.plan.draws_per_epoch
        )

    def before_write(self, path: Path) -> None:
        """Raises OSError where the disk is full on purpose."""
        self.disk.before_write(path)

    def before_step(self, step: int, state) -> None:
        """Before step 0, 1 ...: whatever is to happen in it; state.progress notes what touches the
        row.
        """
        due = [fault for fault in self.left if step_of(fault, self.plan) == step]
        if not due:
            return
        due = self._mark(due, state, [fault for fault in due if fault.kind in IN_LOADER])
        is_struck = self.ranks.rank == min(self.ranks.world_size, self.plan.micro_batches(step)) - 1
        for fault in due:
            if fault.kind == "enospc" and self.ranks.is_first:
                self.disk.fill(fault.seconds)
            elif is_struck and fault.kind in _IN_PROCESS:
                _IN_PROCESS[fault.kind](state.model)

    def _mark(self, due: list[Fault], state, made: Sequence[Fault] = ()) -> list[Fault]:
        """Name faults in the folder; gives those that strike. made: by a loader already.

        Where the disk does not take the names the run goes on, as ever, and a fault that would then
        strike at every call does not strike at all.
        """
        if not due:
            return []
        self.left = tuple(fault for fault in self.left if fault not in due)
        error = self.ranks.broadcast(
            _marked(self._path, due) if self.ranks.is_first else ""
        )  # nobody goes on before
        struck = [fault for fault in due if not error or fault in made]
        state.progress.injected += [
            str(fault) for fault in struck if self._touches(fault) != "nothing"
        ]
        for fault in due:
            not_marked = (
                f": its name cannot be written to {self._path} ({error}), and it would strike at every call"
                if error
                else ""
            )
            state.say(f"{'' if fault in struck else 'not '}injected: {fault}{not_marked}")
        return struck

    def _touches(self, fault: Fault) -> str:
        is_mended = (
            fault.kind == "bad_image" and self.plan.bad_images == "fail"
        )  # the next process reads it whole
        return "nothing" if is_mended else KINDS[fault.kind]


def _marks_in(path: Path) -> list[str]:
    """The faults named in a folder. Raises UserError."""
    try:
        return path.read_text(encoding="ascii").split() if path.exists() else []
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not its text"
        raise UserError(
            f"{path}: which faults have struck cannot be read ({reason}); without it all of inject= strike anew"
        ) from None


def _marked(path: Path, due: list[Fault]) -> str:
    """Name faults in a folder, on the disk for sure: "", or why the disk did not take it."""
    num_bytes = path.stat().st_size if path.exists() else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="ascii") as file:
            file.writelines(f"{fault}\n" for fault in due)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(
            OSError
        ):  # half a name may be there, or a name that has not struck
            os.truncate(path, num_bytes)
        return error.strerror or str(error)
    return ""


def _kill(model) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(model) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _raise(model) -> None:
    raise RuntimeError("a fault of the program's own, as inject= has it")


def _lose_number(model) -> None:
    _in_next_forward(model, lambda logits: logits * math.nan)


def _run_out_of_memory(model) -> None:
    def act(logits):
        import torch

        raise torch.OutOfMemoryError("out of memory, as inject= has it")

    _in_next_forward(model, act)


_IN_PROCESS = {
    "kill": _kill,
    "term": _terminate,
    "raise": _raise,
    "nan": _lose_number,
    "oom": _run_out_of_memory,
}


def _in_next_forward(model, act: Callable) -> None:
    def hook(module, given, logits):
        handle.remove()
        return act(logits)

    handle = model.register_forward_hook(hook)


class Disk:
    """A disk that meets writes as a full one does: the next write, or all for some seconds."""

    def __init__(self) -> None:
        self._num_writes, self._until_s = 0, -math.inf

    def fill(self, seconds: float = 0.0) -> None:
        """Be full for the next write, or for so many seconds."""
        self._num_writes = 0 if seconds else 1
        self._until_s = time.monotonic() + seconds if seconds else -math.inf

    def before_write(self, path: Path) -> None:
        """Raises OSError where the disk is full."""
        if self._num_writes or time.monotonic() < self._until_s:
            self._num_writes = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
