"""What the runs in a folder are doing now, from their files alone: nothing is locked or written."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.base.json_text import last_lines
from trainer.runs.own_runs import (
    KILLED,
    RUNNING,
    STALE,
    STOPPED,
    TRIALS,
    OwnRun,
    last_number,
    own_folders,
    recipe_values,
)


@dataclass(frozen=True)
class WatchedRun:
    """A run folder at one moment; None where its files do not say.

    loss_nats: of the last line of metrics. wait_share: of the time, waiting for images. left_s:
    training still to come at the last speed, evaluations left out. silent_s: since that line; of
    lr-find, which writes no such lines, since its last trial was over.
    """

    own: OwnRun
    loss_nats: float | None = None
    images_per_s: float | None = None
    wait_share: float | None = None
    left_s: float | None = None
    silent_s: float | None = None

    @property
    def state(self) -> str:
        """As `make runs` says it."""
        return self.own.state

    @property
    def done_share(self) -> float | None:
        """How far the run has come, in [0, 1]."""
        if self.own.state == "finished":
            return 1.0
        if self.own.epochs_done is None or not self.own.epochs:
            return None
        return min(1.0, self.own.epochs_done / self.own.epochs)


def watched_runs(runs: Path, results: Path) -> list[WatchedRun]:
    """Every run folder in `runs`, those of lr-find too, the last changed last."""
    return [_watched(one, runs / one.run) for one in own_folders(runs, results)]


def _watched(own: OwnRun, folder: Path) -> WatchedRun:
    metrics, speeds = last_lines(folder / "metrics.jsonl"), last_lines(folder / "speed.jsonl")
    loss_nats = last_number(metrics, "loss_nats")
    if own.state not in (RUNNING, STALE, STOPPED, KILLED):
        return WatchedRun(own, loss_nats)
    speed = last_number(speeds, "images_per_s")
    written = folder / ("metrics.jsonl" if own.num_trials is None else TRIALS)
    silent_s = None
    with contextlib.suppress(OSError):
        silent_s = max(0.0, time.time() - written.stat().st_mtime)
    return WatchedRun(
        own,
        loss_nats,
        speed,
        last_number(speeds, "wait_share"),
        _left_s(own, folder, speed) if own.state in (RUNNING, STALE) else None,
        silent_s,
    )


def _left_s(own: OwnRun, folder: Path, images_per_s: float | None) -> float | None:
    """Seconds of training still to come: the images left by the last speed."""
    values = recipe_values(folder / "recipe.yaml") or {}
    try:
        batch_images, steps = int(values["batch"]["images"]), own.steps_left
        return None if steps is None else steps * batch_images / float(images_per_s or 0)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
