"""The story of a training, from a plan to an outcome."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

from trainer.base import streams
from trainer.base.commands import command
from trainer.base.errors import DataError
from trainer.base.signals import Stopped, StoppedAlone
from trainer.data.dataset import OpenedData
from trainer.distributed.communicator import Ranks
from trainer.engine.evaluate import evaluate, evaluate_all
from trainer.engine.micro_batches import (
    explained,
    num_pieces,
    retry_on_out_of_memory,
    split,
    whole_or_undone,
)
from trainer.engine.null_run import NullRun
from trainer.engine.precise_norm import make_norms_precise
from trainer.engine.state import Timer, TrainingState, set_algorithms

MOST_REPLACED_SHARE = 0.01

Status = Literal["finished", "diverged", "stopped"]


def train(state: TrainingState, data: OpenedData, run: NullRun | None = None) -> Status:
    """Train a model to the end of its plan; the last evaluation is the result.

    run: where the state is resumed from and saved, and where logs go; None keeps nothing. Every
    rank runs all of this; files and logs are written by rank 0 alone.
    """
    run = run or NullRun()
    plan, settings = state.plan, state.settings
    assert plan.class_counts is not None or not plan.recipe.loss.needs_counts, "see planned_over"
    model = plan.recipe.model
    assert plan.patches is not None or not (model and model.whitening), "see planned_over"
    set_algorithms(settings)
    with run.open():
        progress = state.progress
        timer = Timer(progress, state.compiled)
        faults = run.loader_faults()
        loader = timer.batches(
            data.train_stream(plan, settings, progress.step, state.ranks, faults, run.watch)
        )
        loader = with_the_others(loader, state.ranks)
        try:
            if not evaluate_epoch(state, data, run):
                return "diverged"
            if progress.step == 0:
                loader = run.first_batch(loader, data.classes)
            for step in range(progress.step, plan.num_steps):
                if run.ends_early():
                    break
                run.start_step(step)
                with timer, explained(state):
                    state.loss_sum += optimizer_step(state, loader, step)
                    progress.loss_steps += 1
                    progress.num_seen += plan.window_images(step)
                    progress.step = step + 1
                    if is_window_end(state):
                        # waits for the device, while the timer runs
                        progress.loss_sum = state.loss_sum.item()
                log_notes(state, run)
                if is_window_end(state):
                    check_replaced(state)
                    if not log_window(state, timer, run):
                        return "diverged"
                if not evaluate_epoch(state, data, run):
                    return "diverged"
                run.save_if_due()
            run.save()
            evaluate_sizes(state, data, run)
            return "finished"
        except Stopped as signal_name:
            run.stopped(signal_name)
            return "stopped"


def with_the_others(loader: Iterator, ranks: Ranks) -> Iterator:
    """The same micro-batches. A rank that cannot wait for its next one leaves a step that the
    others are in: StoppedAlone takes the place of Stopped.
    """
    try:
        yield from loader
    except Stopped as reason:
        if ranks.is_alone:
            raise
        raise StoppedAlone(str(reason)) from None


def optimizer_step(state: TrainingState, loader: Iterator, step: int) -> torch.Tensor:
    """One optimizer step over its micro-batches: the mean loss over its images, a float64 scalar on
    the device.

    Clipping comes after unscaling. Of several ranks each takes its own micro-batches; loss and
    gradients are those of all.
    """
    plan, model, optimizer, ranks = state.plan, state.model, state.optimizer, state.ranks
    recipe = plan.recipe
    if state.freezing.set(step):
        state.gradients.expect_others()
    for module in state.changing:
        module.set_progress(step / plan.num_steps)
    for group in optimizer.param_groups:
        # older checkpoints have no lr_scale
        group["lr"] = plan.lr_at(step, state.progress.history) * group.get("lr_scale", 1.0)
    with whole_or_undone(state, len(own_micro_batches(state, step))):
        total, num_replaced = retry_on_out_of_memory(add_gradients, state, loader, step)
    state.gradients.finish()
    ranks.sum(total)
    state.progress.num_replaced += ranks.total(num_replaced) if plan.bad_images == "skip" else 0
    each = num_pieces(state, step)
    num_own, number = len(own_micro_batches(state, step)), plan.micro_batches(step)
    state.step_statistics.finish(ranks, num_own * each, number * each, plan.num_parts(step))
    if state.debug:
        state.debug.end_step(step, total.item())
    state.scaler.unscale_(optimizer)
    recipe.optimizer.clip(model)
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        lengths = plan.num_warmup_steps, recipe.batch.images, recipe.epochs, plan.steps_per_epoch
        state.average.update(model, step, *lengths)
    return total


def add_gradients(state: TrainingState, loader: Iterator, step: int) -> tuple[torch.Tensor, int]:
    """Add up the gradients of this rank's micro-batches: (its part of the step's mean loss, images
    replaced).

    Gradients are weighted by images, so that micro-batches of unequal size add up to the mean over
    the step. Dropout and stochastic depth draw from torch's generator, re-seeded for each
    micro-batch.
    """
    plan, task = state.plan, state.task
    own, number_each = own_micro_batches(state, step), num_pieces(state, step)
    num_own, place, num_replaced = len(own) * number_each, 0, 0
    total = torch.zeros((), dtype=state.loss_sum.dtype, device=state.settings.device)

    def passes(inputs: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
        loss = task.loss(state.model, inputs, targets) * share
        if state.debug:
            state.debug.see_loss(loss)
        with state.step_statistics.at_rest():
            state.scaler.scale(loss).backward()
        return loss.detach()

    state.gradients.start()
    for micro_batch in own:
        batch = next(loader)
        assert (batch.step, batch.micro_batch) == (
            step,
            micro_batch,
        ), "the loader and the plan count differently"
        whole = task.prepare(batch)
        torch.manual_seed(streams.torch_seed(plan.seed, "device", step, micro_batch))
        if state.debug:
            state.debug.start(step, micro_batch, batch.shown)
        for inputs, targets in split(*whole, number_each):
            state.step_statistics.set(place, num_own)
            place += 1
            if place == num_own and state.captured is None:
                state.gradients.expect_last()
            share = len(targets) / plan.window_images(step)
            with state.sharing(batch, (place - 1) % number_each, number_each):
                total += state.run(passes, inputs, targets, share)
        num_replaced += batch.num_replaced
    return total, num_replaced


def own_micro_batches(state: TrainingState, step: int) -> list[int]:
    """Which of a step's micro-batches this rank takes, or takes a part of."""
    plan = state.plan
    return list(state.assigned.micro_batches(plan.window_images(step), plan.micro_batches(step)))


def evaluate_epoch(state: TrainingState, data: OpenedData, run: NullRun) -> bool:
    """Evaluate at the end of an epoch, of every n-th as eval_every= says and of the last, unless
    that is done: a stop in the middle leaves it to the next process.

    False where the scored weights' loss is NaN or infinite: their score would mean nothing.
    """
    plan, settings, progress = state.plan, state.settings, state.progress
    is_due = progress.step == plan.last_evaluation(progress.step, settings.eval_every_epochs)
    if progress.step == 0 or not is_due or progress.evaluated_step == progress.step:
        return True
    if plan.recipe.precise_norm is not None:
        first_step = progress.step - plan.steps_per_epoch
        stream = with_the_others(
            data.train_stream(plan, settings, first_step, watch=run.watch), state.ranks
        )
        models = list(state.weights().values())
        make_norms_precise(plan, settings, models, stream, each=lambda: state.ranks.check(run.stop))
        state.ranks.copy(buffer for model in models for buffer in model.buffers())
    batches = data.val_batches(plan, settings, state.ranks, run.watch)
    scores = evaluate_all(plan, settings, state.weights(), batches, run.check, state.ranks)
    loss_nats = scores[state.scored].loss_nats
    if not math.isfinite(loss_nats):
        run.logger.say(
            f"diverged: the validation loss is {loss_nats} after step {progress.step}",
            style="bold red",
        )
        return False
    for which, of_weights in scores.items():
        run.logger.scores(progress.step, progress.step // plan.steps_per_epoch, which, of_weights)
    progress.scores = {which: of_weights.record() for which, of_weights in scores.items()}
    progress.history.append(scores[state.scored].main_pct)
    progress.evaluated_step = progress.step
    run.evaluated()
    return True


def evaluate_sizes(state: TrainingState, data: OpenedData, run: NullRun) -> None:
    """Score the finished model at the other image sizes of test_px=, by the recipe's own share of
    the crop: beside the result, which stays that of the recipe's own size.
    """
    plan, settings, ranks = state.plan, state.settings, state.ranks
    for px in state.other_px:
        batches = data.val_batches(plan, settings, ranks, run.watch, test_px=px)
        scores = evaluate(plan, settings, state.model_at(px), batches, run.check, ranks)
        state.size_scores[px] = scores
        run.logger.say(f"at {px} px  {scores.summary()}")


def is_window_end(state: TrainingState) -> bool:
    """Is a line of metrics due after the step just done?"""
    step = state.progress.step
    return step % state.settings.log_steps == 0 or step % state.plan.steps_per_epoch == 0


def log_notes(state: TrainingState, run: NullRun) -> None:
    """Log what the steps since the last call have to say: memory that ran out, and what has been
    compiled.
    """
    if state.debug:
        if is_window_end(state):
            state.debug.end_window(state.progress.step)
        state.notes += [(line, "yellow") for line in state.debug.notes]
        state.debug.notes.clear()
    for line, style in state.notes:
        run.logger.say(line, style=style)
    state.notes.clear()
    news = state.compiled.news() if state.compiled and is_window_end(state) else None
    if news:
        run.logger.say(news)


def check_replaced(state: TrainingState) -> None:
    """Refuse to continue where bad_images=skip has replaced more than 1 % of
    what was seen.

    Raises DataError.
    """
    plan, progress = state.plan, state.progress
    num_epochs = -(-progress.step // plan.steps_per_epoch)
    if progress.num_replaced > MOST_REPLACED_SHARE * plan.draws_per_epoch * num_epochs:
        raise DataError(
            f"bad_images=skip: {progress.num_replaced} bad images in the first {progress.step}"
            f" steps, more than {100 * MOST_REPLACED_SHARE:g} % of an epoch; "
            f"`{command('check-data')}` lists them: repair or remove them"
        )


def log_window(state: TrainingState, timer: Timer, run: NullRun) -> bool:
    """Log the steps since the last line of metrics; False where their mean loss is NaN or
    infinite.
    """
    plan, progress = state.plan, state.progress
    loss_nats = progress.loss_sum / progress.loss_steps
    if not math.isfinite(loss_nats):
        run.logger.say(
            f"diverged: the training loss is {loss_nats} in the steps up to {progress.step}",
            style="bold red",
        )
        return False
    images_per_s, wait_share = timer.restart()
    epoch = progress.step / plan.steps_per_epoch
    lr = plan.lr_at(progress.step - 1, progress.history)
    run.logger.window(progress.step, epoch, loss_nats, lr, images_per_s, wait_share)
    state.loss_sum.zero_()
    progress.loss_steps = 0
    return True
