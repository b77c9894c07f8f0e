"""`verify`: is a run folder whole, and is it its row's?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.options import DataDir, Device, Results, Runs, Workers, app, user_errors

Evaluate = Annotated[
    bool, typer.Option("--evaluate/--no-evaluate", help="Score the exported model once more.")
]


@app.command()
@user_errors
def verify(
    run: Annotated[str, typer.Option(help="A run's name, or its folder.")],
    evaluate: Evaluate = True,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, bf16 or fp16; absent: the row's, where the device has it.")
    ] = "",
    workers: Workers = "auto",
    data_dir: DataDir = None,
    runs: Runs = Path("runs"),
    results: Results = Path("results"),
) -> None:
    """Check a run folder: checksums, plan, row, store, curves, weights, and the score once more;
    exit 1 where one fails.
    """
    from trainer.base.settings import make_settings
    from trainer.base.terminal import open_terminal
    from trainer.cli.verify_show import check_table, failed_lines
    from trainer.runs.run_folder import find_run_folder
    from trainer.runs.verify import scores_check
    from trainer.runs.verify import verify as checks_of

    folder = find_run_folder(run, runs)
    found = list(checks_of(folder, results))
    row = _finished(folder)
    if (
        evaluate
        and row is not None
        and all(one.is_good for one in found if one.what in ("plan", "row.json", "the model opens"))
    ):
        on_cpu = device == "cpu" or (device == "auto" and not _has_gpu())
        asked = precision or ("auto" if on_cpu and row.precision == "fp16" else row.precision)
        found += scores_check(
            folder, make_settings(device, asked, workers, runs, results), data_dir
        )
    out = open_terminal(160)
    out.print(check_table(folder, found), soft_wrap=False)
    for line in failed_lines(found):
        out.print(line, style="bold red", markup=False)
    raise typer.Exit(0 if all(one.is_good for one in found) else 1)


def _finished(folder: Path):
    """The row of a finished run, None where there is none that reads."""
    from trainer.base.errors import UserError
    from trainer.runs.results import read_row_file

    try:
        row = read_row_file(folder / "row.json")
    except UserError:
        return None
    return row if row.status == "finished" else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
