"""Records of failed runs, kept until the run has a row."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path

from trainer.base.component import StrictModel
from trainer.base.disk import read_regular, write_atomically
from trainer.base.errors import UserError

NUM_TAIL_LINES = 40
_LARGEST_BYTES = 2**24


class FailureError(UserError):
    """The record of a failure is damaged."""


class Failure(StrictModel):
    """The last failed attempt of one seed of a cell.

    run: its run folder's name, None where it has none yet. key: as `identity.RunIdentity.key`.
    error: one line. exit_code: of the process; minus the signal that ended it. log_tail: the last
    lines of its output. num_attempts: that failed so far.
    """

    run: str | None
    cell: str
    seed: int
    key: str
    error: str
    exit_code: int
    log_tail: tuple[str, ...]
    num_attempts: int
    finished_utc: str


def cell_folder(runs: Path, key: str) -> Path:
    """Folder of the lock, the output and the failure of one seed of a cell."""
    return Path(runs) / "cells" / key


def failure_path(runs: Path, key: str) -> Path:
    """The file of a failure of one key."""
    return cell_folder(runs, key) / "failure.json"


def read_failure(runs: Path, key: str) -> Failure | None:
    """The failure of one key, or None.

    Raises FailureError for a damaged file.
    """
    path = failure_path(runs, key)
    try:
        return Failure.model_validate_json(read_regular(path, _LARGEST_BYTES).decode())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        raise FailureError(f"{path}: not a valid failure record ({first}); remove it") from None


def read_failures(runs: Path) -> dict[str, Failure]:
    """All failures under a folder of runs, by key.

    Raises FailureError for a damaged file.
    """
    keys = sorted(path.parent.name for path in (Path(runs) / "cells").glob("*/failure.json"))
    found = {key: read_failure(runs, key) for key in keys}
    return {key: failure for key, failure in found.items() if failure is not None}


def store_failure(
    runs: Path,
    key: str,
    *,
    cell: str,
    seed: int,
    run: str | None,
    exit_code: int,
    output: list[str],
) -> Failure:
    """Record one more failed attempt. output: its lines; the last one that is not blank is the
    error.
    """
    before = read_failure(runs, key)
    failure = Failure(
        run=run,
        cell=cell,
        seed=seed,
        key=key,
        error=error_line(exit_code, output),
        exit_code=exit_code,
        log_tail=tuple(output[-NUM_TAIL_LINES:]),
        num_attempts=(before.num_attempts if before else 0) + 1,
        finished_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = failure_path(runs, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (failure.model_dump_json(indent=2) + "\n").encode())
    return failure


def drop_failure(runs: Path, key: str) -> None:
    """Remove the record of a run that has a row now."""
    failure_path(runs, key).unlink(missing_ok=True)


def error_line(exit_code: int, output: list[str]) -> str:
    """The error in one line of at most 300 characters."""
    if exit_code < 0:
        return f"ended by {signal_name(-exit_code)}" + (
            " (killed, perhaps out of memory)" if exit_code == -9 else ""
        )
    said = [line.strip() for line in output if line.strip()]
    return (said[-1].removeprefix("error: ") if said else f"exit code {exit_code} without output")[
        :300
    ]


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number itself where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
