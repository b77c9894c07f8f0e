"""`ablate`: run the cells of an ablation that have no row yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.ablation.threads import set_num_threads
from trainer.base.errors import UserError, did_you_mean
from trainer.base.memory import importing
from trainer.base.plugins import load_plugins
from trainer.base.settings import sizes_of, trackers_of
from trainer.base.signals import StopRequest
from trainer.cli import options
from trainer.cli.options import app, user_errors

_BACKENDS = ("here", "ray")
AblationName = Annotated[
    str, typer.Option(help="An ablation: a name in ablations/, or a path to a .yaml file.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Runs at a time; default: one per GPU, one without GPUs, on Ray what fits.",
    ),
]
NumGpus = Annotated[
    int | None, typer.Option(min=0, help="GPUs to use, one for each run; default: all.")
]
Retries = Annotated[int, typer.Option(min=0, help="How often to retry a failed run.")]
FailFast = Annotated[
    bool, typer.Option("--fail-fast/--no-fail-fast", help="Stop at the first failure.")
]
Backend = Annotated[str, typer.Option(help="Backend: here (this machine), or ray.")]
Address = Annotated[
    str,
    typer.Option(help="Address of the Ray cluster: auto, a URL, or local to start one here."),
]
PerCell = Annotated[
    str,
    typer.Option(
        "--per-cell",
        "--per_cell",
        help='Ray resources of each run: "cpus=4 gpus=1 memory_gib=8".',
    ),
]
Store = Annotated[str, typer.Option(help="Folder of the stored rows, or a URL that fsspec opens.")]


@app.command()
@user_errors
def ablate(
    ablation: AblationName,
    jobs: Jobs = None,
    gpus: NumGpus = None,
    retries: Retries = 0,
    fail_fast: FailFast = False,
    on: Backend = "here",
    address: Address = "auto",
    per_cell: PerCell = "",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = "auto",
    checkpoint_s: options.CheckpointS = 60.0,
    runs: options.Runs = Path("runs"),
    results: Store = "results",
    test_px: options.TestSizes = "",
    track: options.Track = "",
    plugins: options.PluginFiles = "",
) -> None:
    """Run the cells of an ablation that have no row yet. Rerun the same command to resume; calls
    that share --runs share the work.

    Exit 0: all finished; 3: some diverged; 1: some failed; 75: stopped by a signal.
    """
    _check_options(on, device, gpus, per_cell)
    trackers_of(track)
    sizes_of(test_px)
    if on == "here":
        set_num_threads(runs, ablation, jobs or gpus or 1)
    with StopRequest() as stop:  # before the imports, which take seconds
        load_plugins(plugins)  # only now: a plugin may import torch, which reads how many threads
        with importing():
            from trainer.ablation import start  # torch, likewise; and --help answers without it

        settings = {
            "device": device,
            "precision": precision,
            "workers": workers,
            "checkpoint_s": checkpoint_s,
            "test_px": test_px,
            "track": track,
        }
        shared = start.shared_settings(runs, results, **settings)
        ray = start.RayOptions(address, per_cell) if on == "ray" else None
        code = start.run_ablation(
            ablation, data_dir, shared, jobs, gpus, ray, retries, fail_fast, stop
        )
    raise typer.Exit(code)


def _check_options(on: str, device: str, gpus: int | None, per_cell: str) -> None:
    """Refuse options that contradict each other.

    Raises UserError.
    """
    if on not in _BACKENDS:
        hint = did_you_mean(on, _BACKENDS)
        raise UserError(f"on={on}: unknown{hint}; valid: {', '.join(_BACKENDS)}")
    if per_cell and on != "ray":
        raise UserError(
            f"per_cell={per_cell}: only for on=ray; on this machine use jobs= and gpus="
        )
    if gpus is not None and on == "ray":
        raise UserError(f'gpus={gpus}: only for on=here; on a Ray cluster use per_cell="gpus=1"')
    if ":" in device:
        index = device.partition(":")[2]
        raise UserError(
            f"device={device}: ablate assigns a GPU to every run; use CUDA_VISIBLE_DEVICES={index}"
        )
    if gpus and device == "cpu":
        raise UserError(f"gpus={gpus}: device=cpu uses none; leave one of the two out")
