"""One run of a cell: what the command `train` does, under the cell's lock, its output kept, its
failure recorded.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.ablation.cells import Cell, plan_of_cell
from trainer.ablation.failures import cell_folder, drop_failure, read_failure, store_failure
from trainer.ablation.spec import Ablation
from trainer.base.disk import open_regular
from trainer.base.errors import printable
from trainer.base.exits import (
    EXIT_CLAIMED,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
)
from trainer.base.json_text import json_file
from trainer.base.memory import line_of
from trainer.base.output import Output
from trainer.base.signals import StopRequest
from trainer.recipe.plan import Plan
from trainer.runs.job import Job
from trainer.runs.lock import LockedError, LockLost, owner_of, try_acquire
from trainer.runs.remote_rows import pull_rows, push_row
from trainer.runs.results import Row, read_row_file, rows_folder
from trainer.runs.start import train_job

_NUM_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Shared:
    """What all runs of a sweep share: folders, and settings as the user gave them.

    results: folder of the rows; with a `url`, the folder that mirrors it.
    """

    runs: Path
    results: Path
    url: str | None = None
    device: str = "auto"
    precision: str = "auto"
    workers: str = "auto"
    checkpoint_s: float = 60.0
    test_px: str = ""
    track: str = ""

    @property
    def machine(self) -> dict[str, Any]:
        """The part that `train_job` takes."""
        settings = {"precision": self.precision, "workers": self.workers, "loader": "auto"}
        return settings | {
            "checkpoint_s": self.checkpoint_s,
            "runs": self.runs,
            "results": self.results,
            "test_px": self.test_px,
            "track": self.track,
        }


@dataclass(frozen=True)
class Repeat:
    """One seed of a cell: what one process runs, on any machine. key: of its plan's identity."""

    key: str
    cell: str
    seed: int
    job: Job
    plan: Plan = field(repr=False, compare=False)

    @property
    def prefix(self) -> str:
        """The run's name but for its last six digits, which depend on the data's bytes."""
        return self.plan.identity.prefix


def repeats_of(ablation: Ablation, data_dir: Path | None = None) -> list[Repeat]:
    """All runs of an ablation, in the order in which they are run.

    Raises UserError for a cell whose recipe, model and data do not fit together.
    """
    return [_repeat(ablation, cell, seed, data_dir) for cell, seed in ablation.runs]


def _repeat(ablation: Ablation, cell: Cell, seed: int, data_dir: Path | None) -> Repeat:
    plan = plan_of_cell(cell, seed)
    job = replace(cell.job(seed, data_dir), ablation=ablation.name, cell=cell.name)
    return Repeat(plan.identity.key, cell.name, seed, job, plan)


def run_repeat(repeat: Repeat, shared: Shared) -> int:
    """Run one seed of a cell to its row in this process; gives the exit code of `train`, or
    EXIT_CLAIMED.

    Its output goes to output.txt in the cell's folder. A run that has a row is skipped. A failure
    is recorded before the lock is released, so that no other process starts the run in between.
    """
    folder = cell_folder(shared.runs, repeat.key)
    own = try_acquire(folder)
    if own is None:
        return EXIT_CLAIMED
    with own:
        row = stored_row_of(shared, repeat)
        if row is None:
            code = _run_locked(repeat, shared, folder / "output.txt")
        else:
            code = EXIT_DONE if row.status == "finished" else EXIT_DIVERGED
        if code in (EXIT_DONE, EXIT_DIVERGED):
            drop_failure(shared.runs, repeat.key)
    return code


def _run_locked(repeat: Repeat, shared: Shared, output: Path) -> int:
    start = output.stat().st_size if output.exists() else 0
    with written_to(output):
        code = _train(repeat.job, shared)
        if code in (EXIT_DONE, EXIT_DIVERGED) and shared.url:
            push_row(shared.url, stored_row_of(shared, repeat))
    if code not in (EXIT_DONE, EXIT_DIVERGED, EXIT_STOPPED, EXIT_CLAIMED):
        record_failure(repeat, shared, code, start)
    return code


def _train(job: Job, shared: Shared) -> int:
    """What the command `train` does, in this process; never raises."""
    try:
        with StopRequest() as stop:
            return train_job(job, shared.device, shared.machine, None, None, stop)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except (LockedError, LockLost) as error:  # `train` by hand has the run
        print(printable(str(error)), file=sys.stderr, flush=True)
        return EXIT_CLAIMED
    except BaseException as error:  # whatever it is, the other runs continue
        line = line_of(error)
        if line is None:
            traceback.print_exc()
            return EXIT_FAILED
        print(f"error: {line}", file=sys.stderr, flush=True)
        return EXIT_USER


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Append all output of this process, and of those that it starts, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    streams_before = sys.stdout, sys.stderr
    with open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = Output(file)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams_before
            for number, descriptor in zip((1, 2), before, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def is_running(shared: Shared, repeat: Repeat) -> bool:
    """Does a process work on this seed of a cell: a sweep, or `train` by hand in its run folder?"""
    run = run_folder_of(shared, repeat)
    folders = (cell_folder(shared.runs, repeat.key), *([run] if run else []))
    return any(owner_of(folder) is not None for folder in folders)


def record_failure(repeat: Repeat, shared: Shared, code: int, start: int = 0):
    """Store a failed attempt. start: byte of output.txt where its output begins."""
    run = run_folder_of(shared, repeat)
    lines = _tail(cell_folder(shared.runs, repeat.key) / "output.txt", start)
    return store_failure(
        shared.runs,
        repeat.key,
        cell=repeat.cell,
        seed=repeat.seed,
        run=run.name if run else None,
        exit_code=code,
        output=lines,
    )


def num_failed(repeat: Repeat, shared: Shared) -> int:
    """How many attempts failed since the cell last had a row."""
    failure = read_failure(shared.runs, repeat.key)
    return failure.num_attempts if failure else 0


def _tail(path: Path, start: int) -> list[str]:
    if not path.exists():
        return []
    with open_regular(path) as file:
        file.seek(max(start, path.stat().st_size - _NUM_TAIL_BYTES))
        return file.read().decode(errors="backslashreplace").splitlines()


def stored_row_of(shared: Shared, repeat: Repeat, names: list[str] | None = None) -> Row | None:
    """The row of one seed of a cell: of several, the first run's, not those of again=1.

    names: of the store's files, where the caller has listed them.
    """
    folder = rows_folder(shared.results)
    if names is None:
        if shared.url:
            pull_rows(shared.url, folder, repeat.prefix)
        names = row_names(shared)
    found = sorted(
        (name for name in names if name.startswith(repeat.prefix)),
        key=lambda name: (len(name), name),
    )
    rows = (read_row_file(folder / name) for name in found)
    identity = repeat.plan.identity
    return next((row for row in rows if identity.is_of(row)), None)


def row_names(shared: Shared) -> list[str]:
    """The names of the store's files."""
    folder = rows_folder(shared.results)
    return (
        [name for name in os.listdir(folder) if name.endswith(".json")] if folder.is_dir() else []
    )


def run_folder_of(shared: Shared, repeat: Repeat) -> Path | None:
    """The run folder of one seed of a cell, found by the digests in its plan; None where there is
    none yet.
    """
    plan = repeat.plan
    expected = {"page_digest": plan.page_digest, "recipe_digest": plan.recipe.digest}
    for path in Path(shared.runs).glob(f"{repeat.prefix}{'[0-9a-f]' * 6}/plan.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            facts = json_file(path)
            if {name: facts.get(name) for name in expected} == expected:
                return path.parent
    return None
