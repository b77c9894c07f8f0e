"""All that a run carries from step to step, and how it is saved and taken up again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from trainer.base import provenance
from trainer.base.disk import END_S, keep_trying, why
from trainer.base.errors import UserError
from trainer.base.guard import Guard
from trainer.base.plugins import loaded_plugins
from trainer.components.optimizers import param_groups
from trainer.data.jpeg import decoder_name
from trainer.distributed.communicator import Ranks, alone
from trainer.distributed.gradients import Gradients
from trainer.engine.activation_checkpointing import recompute_activations
from trainer.engine.compile import Compiled
from trainer.engine.precise_norm import StepStatistics
from trainer.engine.settings import Settings
from trainer.models.build import build_model
from trainer.models.small_maps import leave_out_padding_taps
from trainer.recipe.plan import Plan
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.checkpoint_writer import Saver
from trainer.runs.loggers.logger import Log, SilentLog

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Progress:
    """How far a run has come: all of it that is not weights. Saved with every checkpoint.

    step: optimizer steps done. evaluated_step: the step of the last evaluation. loss_sum, loss_steps: of the training
    losses since the last line of metrics. metrics_bytes: the length of metrics.jsonl. num_seen: images trained on.
    train_s: seconds in the loop, evaluations left out. scores: of the last evaluation, by weights ("model", "average").
    machine: what may move the last digits, as the last process found it. changes: where a later process found otherwise,
    and where memory ran out. num_pieces: of each micro-batch, since then. injected: faults on purpose that touch the row.
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
    num_pieces: int = 1
    injected: list[str] = field(default_factory=list)


def progress_of(facts: dict) -> Progress:
    """The progress that a checkpoint tells. Raises ValueError for what is none."""
    expected = Progress()
    for name, value in facts.items():
        kind = type(getattr(expected, name))
        if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is int and value < 0
        ):
            raise ValueError(f"progress.{name} is {value!r}"[:100])
    return Progress(**facts)


def as_it_runs(model: nn.Module, settings: Settings) -> nn.Module:
    """A model, changed in place to how a run with these settings computes it."""
    model.to(
        settings.device,
        memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format,
    )
    if settings.device == "cpu":
        leave_out_padding_taps(model)
    if settings.activation_checkpointing:
        recompute_activations(model)
    return model


class State:
    """Model, optimizer, average, scaler and progress of one run in one folder: on every rank the same, bit for bit."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        folder: Path,
        ranks: Ranks = alone(),
        guard: Guard = Guard(),
    ) -> None:
        self.plan, self.settings, self.folder, self.ranks, self.guard = (
            plan,
            settings,
            folder,
            ranks,
            guard,
        )
        self.model = as_it_runs(build_model(plan), settings)
        groups = param_groups(self.model, plan.recipe.optimizer)
        self.optimizer = plan.recipe.optimizer.build(groups, lr=plan.recipe.lr.peak)
        self.average = plan.recipe.average.start(self.model) if plan.recipe.average else None
        self.scaler = torch.amp.GradScaler(
            settings.device.split(":")[0], enabled=settings.precision == "fp16"
        )
        self.step_statistics = StepStatistics(
            self.model, settings.activation_checkpointing, settings.compile
        )
        self.compiled = (
            Compiled(self.model, plan.recipe.precise_norm is not None) if settings.compile else None
        )  # after the average has copied it
        self.gradients = Gradients(self.model.parameters(), ranks)
        self.say = _say_nothing
        self.progress = Progress(machine=self._machine())
        # the device's running sum of losses: read only where a line is written, so that no step waits for it
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=settings.device)
        self.saver = Saver(folder / "checkpoints", settings.checkpoint_s, guard.before_write)
        self._begun: tuple[int, int] | None = (
            None  # step and evaluated_step of the checkpoint begun last
        )

    def weights(self) -> dict[str, nn.Module]:
        """The models that are evaluated: the trained one and, where the recipe keeps one, its average."""
        return {"model": self.model} | ({"average": self.average.model} if self.average else {})

    @property
    def scored(self) -> str:
        """Whose scores are the run's result."""
        return "average" if self.average and self.plan.recipe.average.is_scored else "model"

    def resume(self) -> list[str]:
        """Take up the newest whole checkpoint, if there is one; gives the lines to tell the reader.

        Rank 0 alone reads the folder: the others get what it found, were it on a disk of its own.
        """
        notes: list[str] = []
        saved = None
        if self.ranks.is_first:
            saved = load_checkpoint(self.folder / "checkpoints", notes.append, self.settings.device)
        saved = self.ranks.broadcast(saved)
        if saved is None:
            self.check_equal()
            return notes
        try:
            self._take(saved)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever torch raises over a state of another kind
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            where = self.folder / "checkpoints"
            raise UserError(
                f"{where}: another run's state ({type(error).__name__}: {reason}); without it the run would start anew"
            ) from None
        self.saver.last_step = self.progress.step
        self.loss_sum.fill_(self.progress.loss_sum)
        self.check_equal()
        notes.append(f"going on after step {self.progress.step} of {self.plan.num_steps}")
        return notes + self._note_changes()

    def _take(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.progress = progress_of(saved["progress"])

    def _note_changes(self) -> list[str]:
        """Compare this machine with the one that saved: a run that went on elsewhere is not one to compare bit for bit."""
        before, now = self.progress.machine, self._machine()
        changes = [
            f"{name} {before[name]} -> {now[name]} after step {self.progress.step}"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]
        self.progress.machine = now
        self.progress.changes += changes
        return [f"note: {change}; the row says so, and is not bitwise" for change in changes]

    def _machine(self) -> dict[str, str]:
        return machine_of(self.settings) | {"ranks": str(self.ranks.world_size)}

    def check_equal(self) -> None:
        """Fail where another rank has other weights, statistics or averages: some sum was not one over all ranks."""
        if self.ranks.is_alone:
            return
        tensors = [
            tensor for model in self.weights().values() for tensor in model.state_dict().values()
        ]
        if not self.ranks.is_same(_fingerprint(tensors)):
            raise RuntimeError(
                f"the weights differ between ranks after step {self.progress.step}: ranks of unlike devices?"
            )

    def save_if_due(self, log: Log | SilentLog) -> None:
        """Begin a checkpoint where rank 0's clock says that it is time for one, or where keep_every= wants one."""
        if self.ranks.is_first:
            self._tell(log)
        is_due = self._is_kept() or self.ranks.any(self.ranks.is_first and self.saver.is_due())
        if is_due and self._can_save() and self.ranks.is_first:
            self._begin(log)

    def save(
        self,
        log: Log | SilentLog,
        for_s: float = END_S,
        is_over: Callable[[], bool] = lambda: False,
    ) -> str:
        """Have the state on the disk before going on: "", or why it is not, though it was tried for so many seconds.

        is_over: asked whether to give up sooner. Weights on their way to nowhere are not written.
        """
        if not self._can_save():
            return "the loss is no number"
        error = (
            keep_trying(lambda: self._finish(log), for_s, is_over) if self.ranks.is_first else None
        )
        return self.ranks.broadcast(why(error) if error else "")

    def _can_save(self) -> bool:
        """Is the loss a number? All ranks ask together, and are found equal."""
        self.progress.loss_sum = self.loss_sum.item()
        if not math.isfinite(self.progress.loss_sum):
            return False
        self.check_equal()
        return True

    def _begin(self, log: Log) -> None:
        self.progress.metrics_bytes = log.metrics_bytes()
        self._begun = (self.progress.step, self.progress.evaluated_step)
        self.saver.start(self.progress.step, self.facts(), log.sync, self._is_kept())
        self._tell(log)

    def _finish(self, log: Log) -> None:
        """Have this very moment's checkpoint on the disk, unless it is there. Raises OSError."""
        self.saver.wait()
        if self.saver.error is not None or self._begun != (
            self.progress.step,
            self.progress.evaluated_step,
        ):
            self._begin(log)
            self.saver.wait()
        self._tell(log)
        if self.saver.error is not None:
            raise self.saver.error

    def _tell(self, log: Log) -> None:
        last = self.saver.last_step
        more = (
            "; none is there yet"
            if last is None
            else f"; the last one there is that of step {last}"
        )
        log.trouble("a checkpoint", self.saver.error, more)

    def _is_kept(self) -> bool:
        """Is this the end of an epoch whose checkpoint keep_every= wants to stay?"""
        every = self.settings.keep_every_epochs * self.plan.steps_per_epoch
        return every > 0 and self.progress.step > 0 and self.progress.step % every == 0

    def facts(self) -> dict:
        """All that a checkpoint holds: the state's own tensors, not copies of them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "progress": asdict(self.progress),
        }


def _say_nothing(line: str, style: str | None = None) -> None:
    """Until a run's log is open."""


def machine_of(settings: Settings) -> dict[str, str]:
    """What may move the last digits of a result."""
    return {
        "device": provenance.device_name(settings.device),
        "precision": settings.precision,
        "threads": str(settings.num_threads),
        "loader": f"{settings.loader}, {decoder_name()}"
        if settings.loader == "torch"
        else settings.loader,
        "compile": str(int(settings.compile)),
        **provenance.versions(),
        **loaded_plugins(),
    }


def _fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """A number that changes with any bit of one tensor: for each the sum of its words, and these in their order."""
    flat = (tensor.detach().contiguous().view(-1) for tensor in tensors)
    sums = [each.view(_WORDS[each.element_size()]).sum(dtype=torch.int64) for each in flat]
    made = 0
    for number in torch.stack(sums).tolist():
        made = (made * 1_000_003 + number) % (2**61 - 1)
    return made


class Watch:
    """Times the training of images and the waiting for them; evaluations and saving do not count.

    Images are those of all ranks; the times are this rank's.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen, self._wait_s, self._busy_s = progress.num_seen, 0.0, 0.0
        self._started_s: float | None = None

    def batches(self, stream: Iterator) -> Iterator:
        """The micro-batches of a stream, timed while they are awaited."""
        while True:
            before_s = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            if self._started_s is not None:  # else it is looked at, not trained on
                self._wait_s += time.perf_counter() - before_s
            yield batch

    def __enter__(self) -> Watch:
        self._started_s = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        seconds = time.perf_counter() - self._started_s
        self._busy_s += seconds
        self._progress.train_s += seconds
        self._started_s = None

    def lap(self) -> tuple[float, float]:
        """(images per second, share of the time spent waiting for data) since the last lap."""
        num_images, self._seen = self._progress.num_seen - self._seen, self._progress.num_seen
        speed = num_images / max(self._busy_s, 1e-9), self._wait_s / max(self._busy_s, 1e-9)
        self._wait_s, self._busy_s = 0.0, 0.0
        return speed
