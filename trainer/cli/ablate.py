"""`ablate`: run the cells of an ablation that have no row yet."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer

from trainer.base.plugins import load_plugins

Ablation = Annotated[
    str, typer.Option(help="A page: a name in ablations/, or a path to a .yaml file.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Runs at a time; absent: one for each GPU, one without, what fits on Ray."
    ),
]
Gpus = Annotated[
    int | None, typer.Option(min=0, help="GPUs to use, one for each run; absent: all.")
]
Retries = Annotated[int, typer.Option(min=0, help="How often this call tries again what failed.")]
FailFast = Annotated[
    bool, typer.Option("--fail-fast/--no-fail-fast", help="Stop at the first failure.")
]
On = Annotated[str, typer.Option(help="here, or ray: a Ray cluster.")]
Address = Annotated[
    str, typer.Option(help="Of the cluster: auto, a URL, or local for one made here.")
]
PerCell = Annotated[
    str,
    typer.Option(
        "--per-cell",
        "--per_cell",
        help='Each run\'s share of the cluster: "cpus=4 gpus=1 memory_gib=8".',
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", "--data_dir", help="Where the data set lies, or is downloaded to."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Text = Annotated[str, typer.Option(help="As for train.")]
CheckpointS = Annotated[
    float,
    typer.Option(
        "--checkpoint-s", "--checkpoint_s", min=0, help="Least seconds between two checkpoints."
    ),
]
Runs = Annotated[
    Path, typer.Option(help="Folder of the run folders; callers that share it share the work.")
]
Results = Annotated[
    str, typer.Option(help="The store of rows: a folder, or a URL that fsspec opens.")
]


def ablate(
    ablation: Ablation,
    jobs: Jobs = None,
    gpus: Gpus = None,
    retries: Retries = 0,
    fail_fast: FailFast = False,
    on: On = "here",
    address: Address = "auto",
    per_cell: PerCell = "",
    data_dir: DataDir = None,
    device: Device = "auto",
    precision: Text = "auto",
    workers: Text = "auto",
    checkpoint_s: CheckpointS = 60.0,
    runs: Runs = Path("runs"),
    results: Results = "results",
    plugins: Annotated[
        str,
        typer.Option(
            help="Python files with components of your own: my_losses.py, several with commas."
        ),
    ] = "",
) -> None:
    """Run the cells of an ablation that have no row yet. The same command goes on where it was
    stopped or killed.

    Ends with 0 where all have finished, 3 where some diverged, 1 where some failed, 75 where a
    signal stopped it.
    """
    check_words(on, device, gpus, per_cell)
    if on == "here":
        use_threads(runs, ablation, jobs or gpus or 1)
    load_plugins(plugins)  # after the threads: a plugin may import torch
    from trainer.ablation.cell_run import repeats_of
    from trainer.ablation.live_table import SweepTable, closing_lines
    from trainer.ablation.runner import Sweep
    from trainer.ablation.spec import load_ablation
    from trainer.base.signals import StopRequest
    from trainer.runs import summary as show

    page = load_ablation(ablation)
    repeats = repeats_of(page, data_dir)
    shared = shared_of(
        runs,
        results,
        device=device,
        precision=precision,
        workers=workers,
        checkpoint_s=checkpoint_s,
    )
    staff = (
        _on_ray(shared, address, per_cell, jobs, retries)
        if on == "ray"
        else _here(shared, jobs, gpus)
    )
    console = show.console()
    console.print(
        f"[bold]{page.name}[/] {len(page.cells)} cells, {len(page.seeds)} seeds, {staff.num_slots} at a time"
    )
    try:
        with StopRequest() as stop, SweepTable(console, shared, page.name) as table:
            sweep = Sweep(repeats, shared, staff, stop, table, retries, fail_fast)
            code = sweep.run()
    finally:
        staff.close()
    for line in closing_lines(sweep.standings, shared, ablation):
        console.print(line, markup=False)
    raise typer.Exit(code)


def check_words(on: str, device: str, gpus: int | None, per_cell: str) -> None:
    """Refuse words that contradict each other.

    Raises UserError.
    """
    from trainer.base.errors import UserError, did_you_mean

    if on not in ("here", "ray"):
        raise UserError(f"on={on}: unknown{did_you_mean(on, ('here', 'ray'))}; valid: here, ray")
    if per_cell and on != "ray":
        raise UserError(
            f"per_cell={per_cell}: is for on=ray; jobs= and gpus= share out this machine"
        )
    if gpus is not None and on == "ray":
        raise UserError(f'gpus={gpus}: is for this machine; on a cluster use per_cell="gpus=1"')
    if ":" in device:
        raise UserError(
            f"device={device}: every run gets a GPU of its own; use CUDA_VISIBLE_DEVICES={device.partition(':')[2]}"
        )
    if gpus and device == "cpu":
        raise UserError(f"gpus={gpus}: device=cpu uses none; leave one of the two out")


def use_threads(runs: Path, ablation: str, jobs: int) -> None:
    """Set the number of threads, before anything is imported that reads it, for this process and
    all it starts.

    Who sets OMP_NUM_THREADS has chosen already.
    """
    from trainer.ablation.backends.local import choose_threads
    from trainer.base.settings import check_writable, num_cores

    check_writable("runs", runs)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(choose_threads(runs, ablation, jobs, num_cores()))


def shared_of(runs: Path, results: str, **settings):
    """Where runs and rows go; a store behind a URL has a mirror under the runs.

    Raises UserError for a folder that cannot be written or a URL that cannot be listed.
    """
    from trainer.ablation.cell_run import Shared
    from trainer.base.settings import check_writable
    from trainer.runs.remote_rows import check_url, is_url
    from trainer.runs.results import rows_folder

    runs = runs.resolve()
    check_writable("runs", runs)
    url = results if is_url(results) else None
    if url:
        check_url(url)
    mirror = runs / "cells" / "stores" / hashlib.sha256(results.encode()).hexdigest()[:12]
    folder = mirror if url else Path(results).resolve()
    check_writable("results", rows_folder(folder))
    return Shared(runs=runs, results=folder, url=url, **settings)


def _here(shared, jobs: int | None, gpus: int | None):
    from functools import partial

    from trainer.ablation.backends.local import LocalCells, count_gpus, preload
    from trainer.ablation.cell_run import run_repeat
    from trainer.base.errors import UserError

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    num_there = 0 if shared.device == "cpu" or gpus == 0 else count_gpus()
    if gpus and gpus > num_there:
        raise UserError(f"gpus={gpus}: torch sees {num_there} GPUs here; use gpus={num_there}")
    names = (named or [str(number) for number in range(num_there)])[
        : num_there if gpus is None else gpus
    ]
    preload()
    return LocalCells(partial(run_repeat, shared=shared), jobs or len(names) or 1, tuple(names))


def _on_ray(shared, address: str, per_cell: str, jobs: int | None, retries: int):
    from trainer.ablation.backends.ray import RayCells, share_of

    return RayCells(shared, address, share_of(per_cell), jobs, retries)
