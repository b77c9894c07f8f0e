"""The end of a run on the disk: in its folder, in the store, and where its own disk takes nothing,
in another place.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.base.disk import END_S, keep_trying, read_regular, why, write_atomically
from trainer.runs.checkpoint import save_checkpoint
from trainer.runs.results import Row


def end_run(
    outcome,
    write: Callable[[Path], Row],
    store: Callable[[Row], None],
    stored: Path,
    is_over: Callable[[], bool],
) -> tuple[Row | None, str]:
    """Write a run's end into its folder by `write`, then its row into the store: (row, why not all
    of it is there, or "").

    Once the store has the row, the same command does nothing more. stored: the row's file there.
    is_over: asked whether to give up sooner.
    """
    folder, rows = outcome.run.folder, []
    for_s = 0.0 if outcome.run.unsaved else END_S  # else the disk was tried for long already
    error = keep_trying(lambda: rows.append(write(folder)), for_s, is_over)
    if error is not None:
        return None, rescued(outcome, why(error), write)
    row = rows[-1]
    error = keep_trying(lambda: store(row), END_S, is_over)
    if error is None:
        return row, ""
    return (
        row,
        (
            f"{stored}: cannot write ({why(error)}); the row is {folder / 'row.json'}; the same"
            " command stores it"
        ),
    )


def rescued(outcome, reason: str, write: Callable[[Path], object]) -> str:
    """Write what `write` writes, and the state, to another place; gives the line that names what is
    where.
    """
    state, run = outcome.state, outcome.run

    def write_all(to: Path) -> None:
        write(to)
        if outcome.status != "diverged" and math.isfinite(state.progress.loss_sum):
            save_checkpoint(to / "checkpoints", state.progress.step, run.state_dict())

    place, last = _in_another_place(run.folder.name, write_all), run.saver.last_step
    there = (
        "no checkpoint is there"
        if last is None
        else f"the last checkpoint there is that of step {last}"
    )
    begin = f"{run.folder}: cannot write the run's end ({reason}); {there}"
    if place is None:
        return f"{begin}; no other place took it; with room there rerun the same command to resume"
    names = (
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".sha256"
    )
    return (
        f"{begin}; all of step {state.progress.step} is in {place}: {', '.join(sorted(names))};"
        " with room there, or with that in its place, rerun the same command to resume"
    )


def _in_another_place(run: str, write: Callable[[Path], None]) -> Path | None:
    """The new folder that takes what `write` writes: the system's temporary one, the user's own,
    the current one.
    """
    for place in (tempfile.gettempdir, Path.home, Path.cwd):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"rsb-{run}-", dir=place()))
            write(folder)
            return folder
        except (OSError, RuntimeError):  # RuntimeError: the user has no home
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    return None


def write_curves(outcome, folder: Path) -> None:
    """Have all of a run's metrics.jsonl in its folder, or in one that takes its place. Raises
    OSError.
    """
    if outcome.run.logger.unwritten is not None:
        write_atomically(folder / "metrics.jsonl", outcome.run.logger.unwritten)
    elif folder != outcome.run.folder:
        with contextlib.suppress(OSError):
            write_atomically(
                folder / "metrics.jsonl", read_regular(outcome.run.folder / "metrics.jsonl")
            )
