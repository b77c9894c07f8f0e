"""Trackio: into its own local folder (TRACKIO_DIR), unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL
says otherwise.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio

from trainer.runs.loggers.tracker import About, PackageTracker, tracker_command


class Trackio(PackageTracker):
    """A run of Trackio. Project: TRACKIO_PROJECT, or rsb; group: the ablation."""

    def __init__(self, about: About, run_id: str | None) -> None:
        project = os.environ.get("TRACKIO_PROJECT", "rsb")
        # it resumes by name, and two folders may have a run of one name
        self.run_id = run_id or f"{about.run}-{uuid.uuid4().hex[:4]}"
        self._folder = Path(about.folder)
        self._run = trackio.init(
            project=project,
            name=self.run_id,
            group=about.ablation,
            config={**about.config, "cell": about.cell},
            resume="allow",
            embed=False,
        )
        self.where = tracker_command("trackio", "show", "--project", project)
        if run_id is None:
            for name in about.files:
                text = (self._folder / name).read_text()
                self._run.log({name: trackio.Markdown(f"```\n{text}\n```")}, step=0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: trackio.Image(str(path))}, step=step)

    def end(self, status: str, row: Mapping[str, Any] | None) -> None:
        if row:
            text = f"{status}\n\n```json\n{json.dumps(dict(row), indent=2)}\n```"
            named = row | row.get("scores_pct", {})
            names = (*_SCORES, *row.get("scores_pct", {}))
            scores = {f"row/{name}": named[name] for name in names if named[name] is not None}
            self._run.log(scores | {"row": trackio.Markdown(text)}, step=row["steps"])
        self._run.finish()


_SCORES = ("top1_pct", "top5_pct", "loss_nats", "images_per_s", "train_s")

open_tracker = Trackio
