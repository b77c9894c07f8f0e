"""What `reproduce` does: it needs torch, which `--help` and `table` must not wait for."""

from __future__ import annotations

import itertools
from pathlib import Path

from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.cli import table_show
from trainer.report.compare import find_row
from trainer.report.rows import stored_rows
from trainer.runs.reproduce import check_plugins, plan_again, run_again, same_cell, verdict


def rerun(
    row: str,
    recipe: str,
    data: str,
    data_dir: Path | None,
    machine: tuple[str, str, str, Path, Path],
    anyway: bool,
    stop: StopRequest,
) -> int:
    """Rerun a row from its own record and print what came of it; gives the exit code.

    machine: device, precision ("" for the row's), workers, runs and results, as the command has
    them.

    Raises UserError.
    """
    device, precision, workers, runs, results = machine
    out, old = table_show.wide_console(), find_row(row, results, runs)
    if not anyway:
        check_plugins(old)
    again = plan_again(old, runs, recipe, data, data_dir)
    precision = precision or old.precision
    settings = make_settings(device, precision, workers, runs, results, in_memory=True)
    code, new = run_again(old, again, settings, out, stop, anyway)
    if new is None:
        return code
    prefix = f"{old.recipe}.v{old.version}-{old.model}-{old.data}-s"
    seeds = same_cell(again.plan, itertools.chain([old], stored_rows(results, prefix)))
    judged = verdict(old, new, seeds)
    table_show.print_verdict(out, old, new, judged)
    return 0 if judged.is_reproduced else 1
