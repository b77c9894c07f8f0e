"""What the commands train, eval, verify and launch-slurm do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from trainer.base.disk import write_atomically
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.terminal import open_terminal
from trainer.cli.options import with_runs
from trainer.distributed.launch import slurm_job
from trainer.distributed.numa import refuse_under_srun
from trainer.models.build import check_model_name
from trainer.models.trained import given_weights
from trainer.runs import rescore, summary
from trainer.runs.job import Job, plan_of
from trainer.runs.results import Row, read_row_file
from trainer.runs.run_folder import find_run_folder
from trainer.runs.start import train_job
from trainer.runs.verify import Check, scores_check
from trainer.runs.verify import verify as run_checks
from trainer.tools.faults import parse_injection

__all__ = [
    "Job", "evaluate", "given_weights", "parse_injection", "train_job", "verify", "write_job_file"
]  # fmt: skip

_TABLE_WIDTH = 160  # digests and paths in full
# without these a new evaluation would say nothing about the run
_NEEDED_TO_EVALUATE = ("plan", "row.json", "the model opens")


def evaluate(
    run: str,
    device: str,
    precision: str,
    workers: str,
    data_dir: Path | None,
    runs: Path,
    results: Path,
) -> bool:
    """Evaluate a run's exported model and print both scores; is it the row's score?"""
    folder = find_run_folder(run, runs)
    settings = make_settings(device, precision, workers, runs, results)
    row, scores, digest = rescore.rescore(folder, settings, data_dir)
    return summary.rescored(summary.console(), row, scores, digest, settings)


def verify(
    run: str,
    with_score: bool,
    device: str,
    precision: str,
    workers: str,
    data_dir: Path | None,
    runs: Path,
    results: Path,
) -> bool:
    """Check a run folder and print a table of the checks; are all good?

    with_score: evaluate the exported model too, where the run has finished and opens. precision:
    empty for the row's; fp16 becomes the device's own choice on a CPU, which has none.
    """
    folder = find_run_folder(run, runs)
    checks = list(run_checks(folder, results))
    row = _finished_row(folder)
    can_score = all(check.is_good for check in checks if check.what in _NEEDED_TO_EVALUATE)
    if with_score and row is not None and can_score:
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        precision = precision or (
            "auto" if on_cpu and row.precision in ("fp16", "tf32") else row.precision
        )
        settings = make_settings(device, precision, workers, runs, results)
        checks += scores_check(folder, settings, data_dir)
    out = open_terminal(_TABLE_WIDTH)
    out.print(_check_table(folder, checks), soft_wrap=False)
    for line in _failed_lines(checks):
        out.print(line, style="bold red", markup=False)
    return all(check.is_good for check in checks)


def _finished_row(folder: Path) -> Row | None:
    """The row of a finished run; None where there is none, or it cannot be read."""
    try:
        row = read_row_file(folder / "row.json")
    except UserError:
        return None
    return row if row.status == "finished" else None


def _check_table(folder: Path, checks: Sequence[Check]) -> Table:
    table = Table("check", "", "expected", "found", title=Text(str(folder)), title_justify="left")
    for one in checks:
        cells = (one.what, "good" if one.is_good else "wrong", one.expected, one.found)
        table.add_row(*map(Text, cells), style=None if one.is_good else "bold red")
    return table


def _failed_lines(checks: Sequence[Check]) -> Iterator[str]:
    """One line for each check that failed, then their number."""
    failed = [check for check in checks if not check.is_good]
    for check in failed:
        yield f"wrong: {check.what}: expected {check.expected}, found {check.found}"
    if failed:
        yield f"{len(failed)} of {len(checks)} checks failed"


def write_job_file(
    argv: list[str], options: Mapping[str, Any], slurm: Mapping[str, Any], path: Path
) -> None:
    """Write the Slurm job file of a training command, checked here rather than on every rank.

    argv: of the command. options: the same, parsed. slurm: nodes, gpus, cpus, hours and extra, as
    slurm_job takes them.

    Raises UserError.
    """
    refuse_under_srun(options["numa"])
    fields = ("recipe", "model", "data", "data_dir", "seed", "bad_images", "again")
    job = Job(
        **{name: options[name] for name in fields},
        overrides=with_runs(options["set_"], options["runs"]),
        weights=given_weights(options["weights"], options["model"], options["runs"]),
        world_size=slurm["nodes"] * (slurm["gpus"] or 1),
    )
    plan = plan_of(job)
    check_model_name(job.model)
    name = "-".join((plan.recipe.name, plan.model, plan.profile.name, f"s{plan.seed}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, slurm_job(argv, name, **slurm).encode())
