"""The story of a run, from a plan to an outcome."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from trainer.base import streams
from trainer.base.disk import END_S, STOP_S, must_write, why
from trainer.base.guard import Guard
from trainer.base.signals import Stopped, StopRequest
from trainer.data.dataset import OpenedData
from trainer.data.index import DataError
from trainer.data.transforms import autocast, prepare
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.evaluate import evaluate_all
from trainer.engine.micro_batches import cut, fitted, num_pieces, told
from trainer.engine.precise_norm import make_norms_precise
from trainer.engine.settings import Settings
from trainer.engine.state import State, Watch
from trainer.recipe.plan import Plan
from trainer.runs.free_space import check_room
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.loggers.logger import Log, SilentLog

MOST_REPLACED_SHARE = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a run ended as: "finished", "diverged" or "stopped", with the state it ended in.

    log: closed; it holds the curves where the disk did not take them. unsaved: why the state is in no checkpoint, or "".
    """

    status: str
    state: State
    log: Log | SilentLog
    unsaved: str = ""


def run(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path,
    console: Console,
    stop: StopRequest,
    ranks: Ranks = alone(),
    guard: Guard = Guard(),
) -> Outcome:
    """Train one model to the end of its plan; the last evaluation is the result.

    The same call on a folder that a stopped or killed run left goes on from its newest whole checkpoint, with as many
    ranks as there are now. Every rank goes through this story; rank 0 alone writes and speaks.

    torch's generators and settings are left as they were found.

    Raises LockLost where another process has taken the folder over.
    """
    gpus = [torch.device(settings.device)] if settings.device.startswith("cuda") else []
    benchmark = torch.backends.cudnn.benchmark
    try:
        with torch.random.fork_rng(gpus):
            return _run(plan, settings, data, folder, console, stop, ranks, guard)
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _run(
    plan: Plan,
    settings: Settings,
    data: OpenedData,
    folder: Path,
    console: Console,
    stop: StopRequest,
    ranks: Ranks,
    guard: Guard,
) -> Outcome:
    fast_algorithms(settings.device)
    state = State(plan, settings, folder, ranks, guard)
    check_room(state)
    notes = state.resume()
    progress = state.progress
    with open_log(state, console) as log, state.saver:
        for note in notes:
            log.say(note)
        state.say = log.say
        watch = Watch(progress)
        window = watch.batches(
            data.train_stream(plan, settings, progress.step, ranks, guard.wrap(state))
        )
        try:
            if not evaluate_epoch(state, data, log, stop):
                return Outcome("diverged", state, log)
            if progress.step == 0 and ranks.is_first:
                window = show_first_batch(state, window, data.classes, log)
            for step in range(progress.step, plan.num_steps):
                ranks.check(stop)
                guard.before_step(step, state)
                with watch, told(state):
                    state.loss_sum += optimizer_step(state, window, step)
                    progress.loss_steps += 1
                    progress.num_seen += plan.window_images(step)
                    progress.step = step + 1
                    if is_window_end(state):
                        progress.loss_sum = (
                            state.loss_sum.item()
                        )  # waits for the device, inside the watch
                if is_window_end(state):
                    check_replaced(state)
                    say_compiled(state, log)
                    if not log_window(state, watch, log):
                        return Outcome("diverged", state, log)
                if not evaluate_epoch(state, data, log, stop):
                    return Outcome("diverged", state, log)
                state.save_if_due(log)
            unsaved = state.save(log, END_S, lambda: stop.is_requested)
            return Outcome("finished", state, log, unsaved)
        except Stopped as signal_name:
            unsaved = state.save(log, STOP_S)
            saved = f"not saved ({unsaved})" if unsaved else "saved"
            log.say(
                f"stopped by {signal_name} after step {progress.step}: {saved}; the same command goes on"
            )
            return Outcome("stopped", state, log, unsaved)


def fast_algorithms(device: str) -> None:
    """Have cuDNN find its algorithms by trying, but in determinism mode: not the same bits twice, promised on a CPU alone."""
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def optimizer_step(state: State, window: Iterator, step: int) -> torch.Tensor:
    """One optimizer step over its micro-batches: the mean loss over its images, a float64 scalar on the device.

    Clipping comes after unscaling. Of several ranks each takes its own micro-batches; loss and gradients are those of all.
    """
    plan, model, optimizer, ranks = state.plan, state.model, state.optimizer, state.ranks
    recipe = plan.recipe
    for group in optimizer.param_groups:
        group["lr"] = plan.lr_at(step)
    total, num_replaced = fitted(add_gradients, state, window, step)
    state.gradients.finish()
    ranks.sum(total)
    state.progress.num_replaced += ranks.total(num_replaced) if plan.bad_images == "skip" else 0
    state.step_statistics.finish(
        ranks, len(own_micro_batches(state, step)), plan.micro_batches(step)
    )
    state.scaler.unscale_(optimizer)
    recipe.optimizer.clip(model)
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        lengths = plan.num_warmup_steps, recipe.batch.images, recipe.epochs, plan.steps_per_epoch
        state.average.update(model, step, *lengths)
    return total


def add_gradients(state: State, window: Iterator, step: int) -> tuple[torch.Tensor, int]:
    """Add up the gradients of this rank's micro-batches: (its part of the step's mean loss, images replaced).

    Gradients are weighted by images, so that micro-batches of unequal size add up to the mean over the step. Dropout and
    stochastic depth draw from torch's generator, re-seeded for each micro-batch.
    """
    plan, settings = state.plan, state.settings
    own, number_each = own_micro_batches(state, step), num_pieces(state, step)
    num_own, place, num_replaced = len(own) * number_each, 0, 0
    total = torch.zeros((), dtype=torch.float64, device=settings.device)
    state.gradients.start()
    for micro_batch in own:
        batch = next(window)
        assert (batch.step, batch.micro_batch) == (step, micro_batch), (
            "the loader and the plan count differently"
        )
        whole = prepare(plan, settings, batch)
        torch.manual_seed(streams.torch_seed(plan.seed, "device", step, micro_batch))
        for images, targets in cut(*whole, number_each):
            state.step_statistics.set(place, num_own)
            with autocast(settings):
                logits = state.model(images)
            loss = plan.recipe.loss(logits.float(), targets) * (
                len(targets) / plan.window_images(step)
            )
            place += 1
            if place == num_own:
                state.gradients.expect_last()
            with state.step_statistics.at_rest():
                state.scaler.scale(loss).backward()
            total += loss.detach()
        num_replaced += batch.num_replaced
    return total, num_replaced


def own_micro_batches(state: State, step: int) -> list[int]:
    """Which of a step's micro-batches are this rank's."""
    return list(state.ranks.share(range(state.plan.micro_batches(step))))


def evaluate_epoch(state: State, data: OpenedData, log: Log, stop: StopRequest) -> bool:
    """Evaluate at the end of an epoch, unless that is done: a stop in the middle leaves it to the next process.

    False where the scored weights' loss is NaN or infinite: their score would mean nothing.
    """
    plan, progress = state.plan, state.progress
    if (
        progress.step == 0
        or progress.step % plan.steps_per_epoch
        or progress.evaluated_step == progress.step
    ):
        return True
    if plan.recipe.precise_norm is not None:
        batches = data.train_stream(plan, state.settings, progress.step - plan.steps_per_epoch)
        models = list(state.weights().values())
        make_norms_precise(
            plan, state.settings, models, batches, each=lambda: state.ranks.check(stop)
        )
        state.ranks.copy(buffer for model in models for buffer in model.buffers())
    batches = data.val_batches(plan, state.settings, state.ranks)

    def check() -> None:
        state.guard.check()
        stop.check()

    scores = evaluate_all(plan, state.settings, state.weights(), batches, check, state.ranks)
    loss_nats = scores[state.scored].loss_nats
    if not math.isfinite(loss_nats):
        log.say(
            f"diverged: the validation loss is {loss_nats} after step {progress.step}",
            style="bold red",
        )
        return False
    for which, of_weights in scores.items():
        log.scores(progress.step, progress.step // plan.steps_per_epoch, which, of_weights)
    progress.scores = {which: vars(of_weights) for which, of_weights in scores.items()}
    progress.evaluated_step = progress.step
    return True


def open_log(state: State, console: Console) -> Log | SilentLog:
    """The run's log on rank 0, a silent one on the others."""
    if not state.ranks.is_first:
        return SilentLog()
    with must_write(state.folder):
        return Log(
            state.folder,
            state.plan.num_steps,
            state.progress.step,
            state.progress.metrics_bytes,
            console,
            state.guard.before_write,
        )


def is_window_end(state: State) -> bool:
    """Is a line of metrics due after the step just done?"""
    step = state.progress.step
    return step % state.settings.log_steps == 0 or step % state.plan.steps_per_epoch == 0


def say_compiled(state: State, log: Log | SilentLog) -> None:
    """Tell what has been compiled since the last line, where anything has."""
    news = state.compiled.news() if state.compiled else None
    if news:
        log.say(news)


def check_replaced(state: State) -> None:
    """Refuse to go on where bad_images=skip has put other images in the place of more than 1 % of what was seen.

    Raises DataError.
    """
    plan, progress = state.plan, state.progress
    num_epochs = -(-progress.step // plan.steps_per_epoch)
    if progress.num_replaced > MOST_REPLACED_SHARE * plan.draws_per_epoch * num_epochs:
        raise DataError(
            f"bad_images=skip: {progress.num_replaced} bad images in the first {progress.step} steps, more than "
            f"{100 * MOST_REPLACED_SHARE:g} % of an epoch; `make check-data` lists them, mend or remove them"
        )


def log_window(state: State, watch: Watch, log: Log) -> bool:
    """Write the line of the steps since the last one; False where their mean loss is NaN or infinite."""
    plan, progress = state.plan, state.progress
    loss_nats = progress.loss_sum / progress.loss_steps
    if not math.isfinite(loss_nats):
        log.say(
            f"diverged: the training loss is {loss_nats} in the steps up to {progress.step}",
            style="bold red",
        )
        return False
    images_per_s, wait_share = watch.lap()
    epoch = progress.step / plan.steps_per_epoch
    log.window(
        progress.step, epoch, loss_nats, plan.lr_at(progress.step - 1), images_per_s, wait_share
    )
    state.loss_sum.zero_()
    progress.loss_steps = 0
    return True


def show_first_batch(state: State, window: Iterator, classes: list[str], log: Log) -> Iterator:
    """Draw the first micro-batch as the model will see it; gives the stream back with it in front."""
    first = next(window)
    path = state.folder / "first_batch.png"
    try:
        draw_first_batch(
            path, *prepare(state.plan, state.settings, first), state.plan.profile, classes
        )
        log.picture("first_batch", path, 0)
    except OSError as error:
        log.say(f"{path}: not drawn ({why(error)})")
    return itertools.chain([first], window)
