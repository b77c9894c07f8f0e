"""One training in its folder: resumed, logged, saved, stopped, ended."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trainer.base import provenance
from trainer.base.disk import END_S, STOP_S, keep_trying, must_write, why
from trainer.base.settings import Settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import OpenedData
from trainer.data.jpeg import decoder_name
from trainer.data.patches import planned_over
from trainer.data.workers import Watch
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.null_run import NullRun
from trainer.engine.state import Progress, TrainingState, algorithms_kept
from trainer.engine.train import Status, train
from trainer.recipe.plan import Plan
from trainer.runs.append_only_log import whole_lines
from trainer.runs.best_weights import BEST_FILE, keep_if_best
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.checkpoint_writer import Saver
from trainer.runs.expected import ExpectedCurve, OffTrack, curve_in
from trainer.runs.free_space import check_room, checkpoint_bytes
from trainer.runs.guard import Guard
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.loggers.logger import Log
from trainer.runs.loggers.tracker import Tracker
from trainer.runs.saved_state import SavedProgress, check_saved, saved_progress
from trainer.runs.step_trace import StepTrace

# a checkpoint's file is not larger than so many times its tensors, and what torch writes of each
_SIZE_MARGIN, _SIZE_MARGIN_BYTES = 2, 2**26

# How long a rank of several that was asked to stop still waits for the images of a step that the
# others are in: after it all can save together.
ALONE_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """What a run ended as, the state it ended in, and its closed run."""

    status: Status
    state: TrainingState
    run: TrainingRun


def train_in_folder(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path,
    console: Console,
    stop: StopRequest,
    ranks: Ranks = alone(),
    guard: Guard = Guard(),
    expected: ExpectedCurve | None = None,
    trackers: Sequence[Tracker] = (),
) -> Outcome:
    """Train a plan in a folder to its end.

    The same call on a folder that a stopped or killed run left resumes from its newest whole
    checkpoint, with as many ranks as there are now.

    torch's generators and settings are left as they were found.

    Raises LockLost where another process has taken the folder over.
    """
    gpus = [torch.device(settings.device)] if settings.device.startswith("cuda") else []
    say = partial(console.print, markup=False, highlight=False)
    plan = planned_over(plan, data.train)
    with (
        data.started_for(plan, settings, ranks, say) as data,
        torch.random.fork_rng(gpus),
        algorithms_kept(),
    ):
        state = TrainingState(plan, settings, ranks)
        run = TrainingRun(folder, state, console, stop, guard, expected, trackers)
        return Outcome(train(state, data, run), state, run)


class TrainingRun(NullRun):
    """A training state's folder: its checkpoints, its logger, the faults to inject. Rank 0 alone
    writes and speaks.

    logger: rank 0's Log once the run is open, silent on the others. unsaved: why the last state is
    in no checkpoint, or "". metrics_written: length and SHA-256 of metrics.jsonl at the last
    checkpoint; curves_incomplete: have lines of it been lost? machine: what may move the last
    digits. program: the code that runs. curve: on rank 0, the main score by epoch of the scored
    weights, in percent. is_off_track: is this what stop_if= asks about, at the last evaluation?
    """

    def __init__(
        self,
        folder: Path,
        state: TrainingState,
        console: Console,
        stop: StopRequest,
        guard: Guard = Guard(),
        expected: ExpectedCurve | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        super().__init__()
        self.folder, self.state, self.console, self.stop = folder, state, console, stop
        self.ranks = state.ranks
        self.guard, self._trackers = guard, trackers
        self.expected = expected
        self.curve: dict[int, float] = {}
        self.is_off_track = False
        self.saver = Saver(folder / "checkpoints", self.settings.checkpoint_s, guard.before_write)
        self.machine = machine_of(state.settings) | {"ranks": str(state.ranks.world_size)}
        self.program = provenance.running_program()
        self.metrics_written: tuple[int, str | None] = (0, None)
        self.curves_incomplete = False
        self.unsaved = ""
        self._trace: StepTrace | None = None
        self._begun: tuple[int, int] | None = (
            None  # step and evaluated_step of the checkpoint begun last
        )

    @property
    def progress(self) -> Progress:
        """Where the training stands."""
        return self.state.progress

    @property
    def settings(self) -> Settings:
        """Where and on what it runs."""
        return self.state.settings

    @property
    def model(self) -> torch.nn.Module:
        """The model that is trained."""
        return self.state.model

    def say(self, line: str, style: str | None = None) -> None:
        """One line for the reader."""
        self.logger.say(line, style)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """The block that trains. Raises UserError where the disk is too small, or holds another
        run's state.
        """
        check_room(self.state, self.folder)
        notes = self.resume()
        metrics = self._metrics_left(notes)
        self.curve = curve_in(metrics.splitlines(), self.state.scored)
        if self.ranks.is_first:
            with must_write(self.folder):
                self.logger = Log(
                    self.folder,
                    self.state.plan.num_steps,
                    self.progress.step,
                    metrics,
                    self.console,
                    self.guard.before_write,
                    self._trackers,
                )
        with self.logger, self.saver:
            for note in notes:
                self.say(note)
            with self._traced():
                yield

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        if not self.settings.profile or not self.ranks.is_first:
            yield
            return
        self._trace = StepTrace(self.folder, self.settings.device, self.say)
        try:
            yield
        finally:
            self._trace.close()

    @property
    def watch(self) -> Watch:
        say = self.say if self.ranks.is_first else Watch().say
        return Watch(lambda: self.stop.check(0.0 if self.ranks.is_alone else ALONE_S), say)

    def loader_faults(self) -> Callable | None:
        return self.guard.wrap(self)

    def start_step(self, step: int) -> None:
        self.ranks.check(self.stop)
        if self._trace:
            self._trace.start_step(step)
        self.guard.before_step(step, self)

    def check(self) -> None:
        self.guard.check()
        super().check()

    def first_batch(self, loader: Iterator, classes: list[str]) -> Iterator:
        """Draw the first micro-batch as the model will see it."""
        if not self.ranks.is_first:
            return loader
        first = next(loader)
        path = self.folder / "first_batch.png"
        try:
            task = self.state.task
            draw_first_batch(path, *task.prepare(first), task, classes)
            self.logger.picture("first_batch", path, 0)
        except OSError as error:
            self.say(f"{path}: picture not written ({why(error)})")
        return itertools.chain([first], loader)

    def evaluated(self) -> None:
        """Compare the score with earlier runs'. Raises OffTrack where stop_if= ends the run."""
        is_off = self.ranks.is_first and self._is_off_track()
        if self.ranks.is_first and self.settings.keep == "best":
            self._keep_best()
        if not self.settings.stop_if:
            return
        self.is_off_track = self.ranks.any(is_off)
        if self.is_off_track and self.progress.step < self.state.plan.num_steps:
            raise OffTrack("stop_if=off_track")

    def ends_early(self) -> bool:
        """Asked on every rank; the first one knows the scores."""
        plan = self.state.plan
        section = plan.recipe.early_stopping
        if section is None or self.progress.step % plan.steps_per_epoch:
            return False
        if not self.ranks.any(self.ranks.is_first and section.is_over(self.curve)):
            return False
        if self.ranks.is_first:
            best, score = max(self.curve.items(), key=lambda item: item[1])
            self.say(
                f"early_stopping: {score:.2f} % of epoch {best} was not reached again; ends after"
                f" epoch {max(self.curve)} of {plan.recipe.epochs}"
            )
        return True

    def _keep_best(self) -> None:
        try:
            self.guard.check()
            keep_if_best(self.folder, self.state.weights()[self.state.scored], self.curve)
        except OSError as error:
            self.say(f"{self.folder / BEST_FILE}: not written ({why(error)})")

    def _is_off_track(self) -> bool:
        epoch = self.progress.step // self.state.plan.steps_per_epoch
        record = self.progress.scores[self.state.scored]
        self.curve[epoch] = self.state.task.restored(record).main_pct
        if self.expected is None:
            return False
        verdict = self.expected.verdict(self.curve, self.settings.eval_every_epochs)
        is_off = verdict.state == "off track"
        self.say(str(verdict), "bold red" if is_off else None)
        return is_off

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds: the state, and beside its progress what the run knows of the
        curves and the machine.
        """
        saved = self.state.state_dict()
        num_bytes, sha256 = self.metrics_written
        saved["progress"] |= {
            "metrics_bytes": num_bytes,
            "metrics_sha256": sha256,
            "curves_incomplete": self.curves_incomplete,
            "machine": self.machine,
            "code": asdict(self.program),
        }
        return saved

    def resume(self) -> list[str]:
        """Load the newest whole checkpoint, if there is one; gives the lines to tell the reader.

        Rank 0 alone reads the folder: the others get what it found, were it on a disk of its own.
        """
        notes: list[str] = []
        saved = (
            load_checkpoint(
                self.saver.folder,
                notes.append,
                self.state.settings.device,
                lambda saved, step: check_saved(saved, step, self.state),
                _SIZE_MARGIN * checkpoint_bytes(self.state) + _SIZE_MARGIN_BYTES,
            )
            if self.ranks.is_first
            else None
        )
        saved = self.ranks.broadcast(saved)
        if saved is not None:
            found = self._load(saved)
            self.saver.last_step = self.progress.step
            notes.append(f"resumed after step {self.progress.step} of {self.state.plan.num_steps}")
            notes += self._note_changes(found)
        self.state.check_equal()
        return notes

    def _load(self, saved: dict[str, Any]) -> SavedProgress:
        """Take the content of a checkpoint that check_saved has found to be this run's."""
        self.state.load_state_dict(saved)
        found = saved_progress(saved)
        self.metrics_written = found.metrics_bytes, found.metrics_sha256
        self.curves_incomplete = found.curves_incomplete
        return found

    def _metrics_left(self, notes: list[str]) -> bytes:
        """The lines of metrics.jsonl that the checkpoint counts, as far as they are there: that
        curves are lost ends no run.
        """
        num_bytes, sha256 = self.metrics_written
        if not self.ranks.is_first or not num_bytes:
            return b""
        path = self.folder / "metrics.jsonl"
        with must_write(self.folder):
            left = whole_lines(path, num_bytes, sha256)
        if len(left) < num_bytes or sha256 not in (None, hashlib.sha256(left).hexdigest()):
            self.curves_incomplete = True
            notes.append(
                f"{path.name}: of the {num_bytes} bytes before step {self.progress.step}"
                f" {len(left)} are left: the curves are incomplete, and the row says so"
            )
        return left

    def _note_changes(self, found: SavedProgress) -> list[str]:
        """Compare this machine and this code with those that saved: a run that was resumed by
        others is not one to compare bit for bit.
        """
        before, now = dict(found.machine), dict(self.machine)
        if found.code is not None and found.code.digest != self.program.digest:
            before["code"] = str(provenance.Program(**found.code.model_dump()))
            now["code"] = str(self.program)
        changes = [
            f"{name} {before[name]} -> {value} after step {self.progress.step}"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        self.progress.changes += changes
        return [f"note: {change}; the row says so, and is not bitwise" for change in changes]

    def save_if_due(self) -> None:
        """Begin a checkpoint where rank 0's clock says that it is time for one, or where
        keep_every= wants one.
        """
        self._log_trouble()
        is_due = self._is_kept() or self.ranks.any(self.ranks.is_first and self.saver.is_due())
        if is_due and self._can_save() and self.ranks.is_first:
            self._begin()

    def save(self, for_s: float | None = None, is_over: Callable[[], bool] | None = None) -> None:
        """Have the state on the disk before going on; `unsaved` says why it is not, though it was
        tried for so many seconds.

        is_over: asked whether to give up sooner. Weights on their way to nowhere are not written.
        """
        if not self._can_save():
            self.unsaved = "the loss is no number"
            return
        for_s, is_over = (
            END_S if for_s is None else for_s,
            is_over or (lambda: self.stop.is_requested),
        )
        error = keep_trying(self._finish, for_s, is_over) if self.ranks.is_first else None
        self.unsaved = self.ranks.broadcast(why(error) if error else "")

    def stopped(self, signal_name: BaseException) -> None:
        self.save(STOP_S, lambda: False)
        saved = f"not saved ({self.unsaved})" if self.unsaved else "saved"
        without = f" without {signal_name}" if self.is_off_track else ""
        self.say(
            f"stopped by {signal_name} after step {self.progress.step}: {saved}; rerun the"
            f" same command{without} to resume"
        )

    def _can_save(self) -> bool:
        """Is the loss a number? All ranks ask together, and are found equal."""
        if not math.isfinite(self.state.loss_sum.item()):
            return False
        self.state.check_equal()
        return True

    def _begin(self) -> None:
        self.metrics_written = self.logger.metrics_written()
        self._begun = (self.progress.step, self.progress.evaluated_step)
        self.saver.start(self.progress.step, self.state_dict(), self.logger.sync, self._is_kept())
        self._log_trouble()

    def _finish(self) -> None:
        """Have this very moment's checkpoint on the disk, unless it is there. Raises OSError."""
        self.saver.wait()
        if self.saver.error is not None or self._begun != (
            self.progress.step,
            self.progress.evaluated_step,
        ):
            self._begin()
            self.saver.wait()
        self._log_trouble()
        if self.saver.error is not None:
            raise self.saver.error

    def _log_trouble(self) -> None:
        last = self.saver.last_step
        more = (
            "; none is there yet"
            if last is None
            else f"; the last one there is that of step {last}"
        )
        self.logger.trouble("a checkpoint", self.saver.error, more)

    def _is_kept(self) -> bool:
        """Is this the end of an epoch whose checkpoint keep_every= wants to stay?"""
        every = self.state.settings.keep_every_epochs * self.state.plan.steps_per_epoch
        return every > 0 and self.progress.step > 0 and self.progress.step % every == 0


def machine_of(settings: Settings) -> dict[str, str]:
    """What may move the last digits of a result."""
    return {
        "device": provenance.device_name(settings.device),
        "precision": settings.precision,
        "threads": str(settings.num_threads),
        "loader": (
            f"{settings.loader}, {decoder_name()}"
            if settings.loader == "torch"
            else settings.loader
        ),
        "compile": str(int(settings.compile)),
        "compile_mode": settings.compile_mode,
        "cuda_graphs": str(int(settings.cuda_graphs)),
        "half_group_norm": str(int(settings.half_group_norm)),
        **provenance.versions(),
    }
