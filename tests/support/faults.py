"""What tests do to runs: faults in some cells, and a trace of what trained where.

FAULTS: JSON, the smoothing of a cell -> "raise", "memory" (torch's error), "kill" (what the kernel
does where memory is out), "hang", "diverge" (a loss that is no number); it strikes at the run's
second step. TRACE: a folder; every step leaves a line in <run>.steps, and a line in <run>.overlaps
where another living process has trained the same run; a stored row leaves one in <run>.stored.
"""

import fcntl
import json
import math
import os
import signal
from pathlib import Path

import torch

_locks = {}


def strike(what: str) -> str:
    if what == "raise":
        raise ValueError("an injected error")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
    if what == "hang":
        signal.pause()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return what


def note(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def trace(folder: Path, run: str, step: int) -> None:
    """One line for the step; the lock is held until this process ends, however it ends."""
    if run not in _locks:
        _locks[run] = open(folder / f"{run}.lock", "w")  # noqa: SIM115  it stays open
        try:
            fcntl.flock(_locks[run], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            note(folder / f"{run}.overlaps", str(os.getpid()))
    note(folder / f"{run}.steps", f"{os.getpid()} {step}")


def install() -> None:
    from trainer.engine import train
    from trainer.runs import job, run

    wanted = json.loads(os.environ.get("FAULTS", "{}"))
    folder = Path(os.environ["TRACE"]) if "TRACE" in os.environ else None
    start, steps, store = run.TrainingRun.start_step, train.optimizer_step, job.store_row
    started = []  # the runs whose step comes next: none in the one step before a sweep

    def starting(one, step):
        start(one, step)
        started.append(one)
        if folder:
            trace(folder, one.folder.name, step)

    def stepping(state, loader, step):
        is_run = bool(started) and started.pop() is not None
        smoothing = f"{state.plan.recipe.smoothing:g}"
        if is_run and step == 1 and smoothing in wanted and strike(wanted[smoothing]) == "diverge":
            return torch.full((), math.nan, dtype=torch.float64)
        return steps(state, loader, step)

    def storing(results, row):
        path = store(results, row)
        if folder:
            note(folder / f"{row.run}.stored", str(os.getpid()))
        return path

    run.TrainingRun.start_step, train.optimizer_step, job.store_row = starting, stepping, storing
    run.TrainingRun.first_batch = lambda one, loader, classes: (
        loader
    )  # a third of such a short run's time
