"""Small runs whose disk fails at a step, and what they leave."""

import errno
import io
import json
import os
from pathlib import Path

from PIL import Image
from rich.console import Console

from support.plans import small_set
from trainer.base import disk
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.runs import append_only_log as kept_file
from trainer.runs import checkpoint, run
from trainer.runs.job import Job, plan_of, run_job

JOB = Job(
    "A2",
    "test_resnet",
    overrides=small_set(
        "epochs=1 batch.images=96 batch.norm_images=48 'average={name: ema, decay: 0.9,"
        " every_steps: 1}'"
    ),
)
NUM_STEPS = 14  # 1437 // 96


def go(folder: Path, results: Path | None = None, **settings):
    """Run it in a folder: (exit code, row, what was printed)."""
    plan = plan_of(JOB)
    made = make_settings(
        "cpu",
        workers="0",
        runs=folder / "runs",
        results=results or folder / "results",
        **{"checkpoint_s": 0} | settings,
    )
    out = Console(file=io.StringIO(), width=200)
    run.draw_first_batch = lambda path, *_: Image.new("RGB", (2, 2)).save(
        path
    )  # seconds of matplotlib's
    with StopRequest() as stop:
        code, row = run_job(JOB, plan, made, open_data(plan.profile, None), out, stop)
    return code, row, out.file.getvalue()


def at_steps(patch, acts: dict) -> None:
    """Call acts[step](run) before a step."""
    start = run.TrainingRun.start_step

    def starting(one, step):
        start(one, step)
        if step in acts:
            acts[step](one)

    patch.setattr(run.TrainingRun, "start_step", starting)


class FullDisk:
    """While it is full, no file under its folder can be written or made."""

    def __init__(self, patch, folder: Path, number: int = errno.ENOSPC) -> None:
        self.is_full, self.folder, self.number = False, str(folder), number
        self.opened, self.pwrite = os.open, os.pwrite
        for module in (checkpoint, disk):
            patch.setattr(module, "open", self._open_file, raising=False)
        patch.setattr(kept_file.os, "pwrite", self._pwrite)
        patch.setattr(kept_file.os, "open", self._open)

    def _check(self, path) -> None:
        if self.is_full and str(path).startswith(self.folder):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def _open_file(self, path, mode="r", *given, **named):
        if "w" in mode:
            self._check(path)
        return open(path, mode, *given, **named)

    def _open(self, path, flags, *given, **named):
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._check(path)
        return self.opened(path, flags, *given, **named)

    def _pwrite(self, descriptor, content, place):
        self._check(os.readlink(f"/proc/self/fd/{descriptor}"))
        return self.pwrite(descriptor, content, place)


def left_by(folder: Path) -> dict:
    """What must be equal however the disk behaved: the row's science, the curves byte for byte."""
    (path,) = (folder / "results" / "rows").glob("*.json")
    row = json.loads(path.read_text())
    science = ("run", "status", "top1_pct", "loss_nats", "steps", "weights_sha256", "changes")
    return {
        "row": {name: row[name] for name in science},
        "metrics": run_folder(folder).joinpath("metrics.jsonl").read_bytes(),
    }


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found
