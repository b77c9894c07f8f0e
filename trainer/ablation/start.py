"""An ablation from the command's options to its exit code: store, backend, sweep, closing lines."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.markup import escape

from trainer.ablation.backends.local import LocalCells, count_gpus, preload
from trainer.ablation.backends.ray import RayCells, share_of
from trainer.ablation.cell_run import Shared, repeats_of, run_repeat
from trainer.ablation.live_table import SweepTable, closing_lines
from trainer.ablation.runner import Backend, Sweep
from trainer.ablation.spec import load_ablation
from trainer.base.errors import UserError
from trainer.base.plural import counted
from trainer.base.settings import check_writable
from trainer.base.signals import StopRequest
from trainer.runs import summary
from trainer.runs.remote_rows import check_url, is_url
from trainer.runs.results import rows_folder


@dataclass(frozen=True)
class RayOptions:
    """Where a cluster is, and what each run gets of it, as the user wrote both."""

    address: str
    per_cell: str


def run_ablation(
    name: str,
    data_dir: Path | None,
    shared: Shared,
    jobs: int | None,
    gpus: int | None,
    ray: RayOptions | None,
    retries: int,
    fail_fast: bool,
    stop: StopRequest,
) -> int:
    """Run the cells of an ablation that have no row yet, and print how they stand; gives the exit
    code.

    jobs, gpus: None for as many as fit. ray: None for this machine.

    Raises UserError.
    """
    ablation = load_ablation(name)
    repeats = repeats_of(ablation, data_dir)
    backend: Backend
    if ray is None:
        backend = _local_backend(shared, jobs, gpus)
    else:
        backend = RayCells(shared, ray.address, share_of(ray.per_cell), jobs, retries)
    console = summary.console()
    console.print(
        f"[bold]{escape(ablation.name)}[/] {counted(len(ablation.cells), 'cell')}, "
        f"{counted(len(ablation.seeds), 'seed')}, {backend.num_slots} at a time"
    )
    try:
        with SweepTable(console, shared, ablation.name) as table:
            sweep = Sweep(repeats, shared, backend, stop, table, retries, fail_fast)
            code = sweep.run()
    finally:
        backend.close()
    for line in closing_lines(sweep.statuses, shared, name):
        console.print(line, markup=False)
    return code


def shared_settings(runs: Path, results: str, **settings) -> Shared:
    """What all runs share. A store behind a URL has a mirror in the folder of the runs.

    Raises UserError for a folder that cannot be written, or a URL that cannot be listed.
    """
    runs = runs.resolve()
    check_writable("runs", runs)
    url = results if is_url(results) else None
    if url:
        check_url(url)
        folder = runs / "cells" / "stores" / hashlib.sha256(url.encode()).hexdigest()[:12]
    else:
        folder = Path(results).resolve()
    check_writable("results", rows_folder(folder))
    return Shared(runs=runs, results=folder, url=url, **settings)


def _local_backend(shared: Shared, jobs: int | None, gpus: int | None) -> LocalCells:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    num_gpus = 0 if shared.device == "cpu" or gpus == 0 else count_gpus()
    if gpus and gpus > num_gpus:
        raise UserError(f"gpus={gpus}: torch sees {num_gpus} GPUs here; use gpus={num_gpus}")
    names = visible or [str(index) for index in range(num_gpus)]
    names = names[: num_gpus if gpus is None else gpus]
    preload()
    return LocalCells(partial(run_repeat, shared=shared), jobs or len(names) or 1, tuple(names))
