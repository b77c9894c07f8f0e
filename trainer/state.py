"""All that a run carries from step to step, and how it is saved and taken up again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from trainer import provenance
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.ingredients.optimizers import param_groups
from trainer.log import Log
from trainer.models import build_model
from trainer.plan import Plan
from trainer.settings import Settings
from trainer.statistics import StepStatistics


@dataclass
class Progress:
    """How far a run has come: all of it that is not weights. Saved with every checkpoint.

    step: optimizer steps done. evaluated_step: the step of the last evaluation. loss_sum, loss_steps: of the training
    losses since the last line of metrics. metrics_bytes: the length of metrics.jsonl. num_seen: images trained on.
    train_s: seconds in the loop, evaluations left out. scores: of the last evaluation, by weights ("model", "average").
    machine: what may move the last digits, as the last process found it. changes: where a later process found otherwise.
    """

    step: int = 0
    evaluated_step: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    num_replaced: int = 0
    num_seen: int = 0
    metrics_bytes: int = 0
    train_s: float = 0.0
    scores: dict[str, dict] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


class State:
    """Model, optimizer, average, scaler and progress of one run in one folder."""

    def __init__(self, plan: Plan, settings: Settings, folder: Path) -> None:
        self.plan, self.settings, self.folder = plan, settings, folder
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = build_model(plan).to(settings.device, memory_format=memory_format)
        groups = param_groups(self.model, plan.recipe.optimizer)
        self.optimizer = plan.recipe.optimizer.build(groups, lr=plan.recipe.lr.peak)
        self.average = plan.recipe.average.start(self.model) if plan.recipe.average else None
        self.scaler = torch.amp.GradScaler(settings.device.split(":")[0], enabled=settings.precision == "fp16")
        self.step_statistics = StepStatistics(self.model)
        self.progress = Progress(machine=machine_of(settings))
        # the device's running sum of losses: read only where a line is written, so that no step waits for it
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=settings.device)
        self._saved_s = time.monotonic()

    def weights(self) -> dict[str, nn.Module]:
        """The models that are evaluated: the trained one and, where the recipe keeps one, its average."""
        return {"model": self.model} | ({"average": self.average.model} if self.average else {})

    @property
    def scored(self) -> str:
        """Whose scores are the run's result."""
        return "average" if self.average and self.plan.recipe.average.is_scored else "model"

    def resume(self) -> list[str]:
        """Take up the newest whole checkpoint, if there is one; gives the lines to tell the reader."""
        notes: list[str] = []
        saved = load_checkpoint(self.folder / "checkpoints", notes.append, self.settings.device)
        if saved is None:
            return notes
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.progress = Progress(**saved["progress"])
        self.loss_sum.fill_(self.progress.loss_sum)
        notes.append(f"going on after step {self.progress.step} of {self.plan.num_steps}")
        return notes + self._note_changes()

    def _note_changes(self) -> list[str]:
        """Compare this machine with the one that saved: a run that went on elsewhere is not one to compare bit for bit."""
        before, now = self.progress.machine, machine_of(self.settings)
        changes = [
            f"{name} {before[name]} -> {now[name]} after step {self.progress.step}"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]
        self.progress.machine = now
        self.progress.changes += changes
        return [f"note: {change}; the row says so, and is not bitwise" for change in changes]

    def save(self, log: Log) -> bool:
        """Write a checkpoint, unless the weights are on their way to nowhere; was it written?"""
        self.progress.loss_sum = self.loss_sum.item()
        if not math.isfinite(self.progress.loss_sum):
            return False
        self.progress.metrics_bytes = log.metrics_bytes()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.folder / "checkpoints", self.progress.step, state)
        self._saved_s = time.monotonic()
        return True

    def save_if_due(self, log: Log) -> None:
        if time.monotonic() - self._saved_s >= self.settings.checkpoint_s:
            self.save(log)


def machine_of(settings: Settings) -> dict[str, str]:
    """What may move the last digits of a result."""
    return {
        "device": provenance.device_name(settings.device),
        "precision": settings.precision,
        "threads": str(settings.num_threads),
        "torch": provenance.package_version("torch"),
    }


class Watch:
    """Times the training of images and the waiting for them; evaluations and saving do not count."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._images, self._wait_s, self._busy_s = 0, 0.0, 0.0
        self._started_s: float | None = None

    def batches(self, stream: Iterator) -> Iterator:
        """The micro-batches of a stream, timed while they are awaited."""
        while True:
            before_s = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self._wait_s += time.perf_counter() - before_s
            self._images += len(batch.labels)
            yield batch

    def __enter__(self) -> Watch:
        self._started_s = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        seconds = time.perf_counter() - self._started_s
        self._busy_s += seconds
        self._progress.train_s += seconds

    def lap(self) -> tuple[float, float]:
        """(images per second, share of the time spent waiting for data) since the last lap."""
        speed = self._images / max(self._busy_s, 1e-9), self._wait_s / max(self._busy_s, 1e-9)
        self._images, self._wait_s, self._busy_s = 0, 0.0, 0.0
        return speed
