"""Weights & Biases: offline, into wandb/ beside the run folders, unless WANDB_MODE says otherwise.

Not into the run folder: W&B links to files outside it, and no run is resumed over such a link.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from trainer.base.exits import EXIT_DIVERGED, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from trainer.runs.loggers.tracker import About, PackageTracker, tracker_command

_CODES = {
    "finished": EXIT_DONE,
    "diverged": EXIT_DIVERGED,
    "stopped": EXIT_STOPPED,
    "failed": EXIT_FAILED,
}


class Wandb(PackageTracker):
    """A run of W&B. Project: WANDB_PROJECT, or rsb; group and job type: ablation and cell."""

    def __init__(self, about: About, run_id: str | None) -> None:
        self._folder, runs = about.folder, Path(about.folder).parent
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rsb"),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # it checks
            dir=str(runs),
            id=run_id or uuid.uuid4().hex[:16],
            name=about.run,
            group=about.ablation,
            job_type=about.cell,
            config=dict(about.config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, disable_code=True),
        )
        self.run_id = self._run.id
        sync = tracker_command("wandb", "sync", "--append", f"{runs}/wandb")
        self.where = self._run.url or f"offline; to upload: {sync}/*-{self.run_id}"
        for name in about.files:
            self._save(name)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: wandb.Image(str(path))}, step=step)

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        self._run.summary.update({"status": status} | ({"row": dict(row)} if row else {}))
        if row:
            self._save("row.json")
        if status == "stopped":
            self._run.mark_preempting()  # not failed: it is to be resumed
        self._run.finish(exit_code=_CODES[status])

    def _save(self, name: str) -> None:
        self._run.save(os.path.join(self._folder, name), base_path=self._folder, policy="now")


open_tracker = Wandb
