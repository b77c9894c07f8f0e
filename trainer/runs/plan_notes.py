"""The notes on a plan: what a user may not expect of the run, one line each."""

from __future__ import annotations

import json

from rich.console import Console

from trainer.base.commands import command
from trainer.base.cores import BUSY_LOAD
from trainer.base.plural import counted
from trainer.components.pixels.channels import channel_notes
from trainer.recipe.adapt import images_of_rate, rates_by_rule
from trainer.recipe.plan import Plan

# optimizer steps at the peak rate: with fewer, a third and more of BatchNorm's running statistics
# (momentum 0.1) is still their initial value. A1 and A3 on the digits: chance after 44 steps that
# are worth 1, 47 and 30 % after 88 that are worth 23.
FEWEST_FULL_STEPS = 10
_MUCH_WARMUP = 1 / 3  # of a run


def weights_note(out: Console, plan: Plan) -> None:
    """A model's name with a tag means weights in timm; here they are not loaded."""
    _, _, tag = plan.model.partition(".")
    given = plan.recipe.model and plan.recipe.model.pretrained
    if tag and given is None:
        line = (
            f"note: starts from random weights, by the seed: the weights {tag} that {plan.model}"
            f" has in timm are not loaded; to start from them: weights=timm:{plan.model}"
        )
        out.print(line, style="yellow", markup=False, soft_wrap=True)


def normalization_note(out: Console, plan: Plan) -> None:
    """Where images are not normalized by the data's own mean and deviation, by whose instead."""
    if plan.recipe.image.mean is not None:
        whose = (
            "the weights'" if plan.recipe.model and plan.recipe.model.pretrained else "the recipe's"
        )
        line = (
            f"note: images are normalized by {whose} mean and deviation; by the data's own:"
            ' set="image.mean=null image.std=null"'
        )
        out.print(line, style="yellow", markup=False, soft_wrap=True)


def warmup_note(out: Console, plan: Plan) -> None:
    """Where nothing is left of the run after its warm-up, the recipe's rate is never reached; where
    epochs= has shortened the run alone, most of it may be warm-up.
    """
    lr, shorter = plan.recipe.lr, _shortened(plan)
    length = "warmup_epochs" if lr.warmup_steps is None else "warmup_steps"
    if plan.num_warmup_steps >= plan.num_steps:
        line = (
            f'note: the whole run is warm-up; set="lr.{length}=null lr.warmup_from=null" leaves'
            " it out"
        )
    elif shorter is not None and plan.num_warmup_steps > _MUCH_WARMUP * plan.num_steps:
        share = plan.num_warmup_steps / plan.num_steps
        count = max(1, round(getattr(lr, length) * shorter))
        line = (
            f"note: {share:.0%} of this shorter run is warm-up;"
            f' set="epochs={plan.recipe.epochs} lr.{length}={count}" shortens that too'
        )
    else:
        return
    out.print(line, style="yellow", markup=False, soft_wrap=True)


def _shortened(plan: Plan) -> float | None:
    """The run's share of its recipe's epochs, where it is shorter and its warm-up as long; else
    None.
    """
    by_path = {deviation.path: deviation for deviation in plan.deviations}
    if {"lr.warmup_epochs", "lr.warmup_steps", "lr"} & set(by_path):
        return None
    before = by_path["epochs"].before if "epochs" in by_path else plan.recipe.epochs
    return plan.recipe.epochs / before if plan.recipe.epochs < before else None


def few_steps_note(out: Console, plan: Plan) -> None:
    """Where a run is too short to learn, what to expect."""
    num_full = _num_full_steps(plan)
    if num_full >= FEWEST_FULL_STEPS:
        return
    if _starts_from_weights(plan):
        expected = "expect little of a classifier that starts anew"
    elif plan.recipe.task is None:
        expected = f"expect about chance, 1 of {plan.profile.num_classes:,} classes right"
    else:
        expected = "expect what a model answers that has learned nothing"
    line = (
        f"note: {expected}: of the learning rate's peak the {counted(plan.num_steps, 'step')} have"
        f" as much as {num_full:.2g} whole ones; train for more epochs"
    )
    out.print(line, style="yellow", markup=False, soft_wrap=True)


def num_full_steps(plan: Plan) -> float | None:
    """The steps of a run from random weights, each counted by its share of the peak rate; counted
    no further than FEWEST_FULL_STEPS. None where it starts from trained weights.
    """
    return None if _starts_from_weights(plan) else _num_full_steps(plan)


def _starts_from_weights(plan: Plan) -> bool:
    return plan.recipe.model is not None and plan.recipe.model.pretrained is not None


def _num_full_steps(plan: Plan) -> float:
    num_full = 0.0
    for step in range(plan.num_steps):  # ends early: a long run has hundreds of thousands
        num_full += plan.lr_at(step) / plan.recipe.lr.peak
        if num_full >= FEWEST_FULL_STEPS:
            break
    return num_full


def busy_note(out: Console, load: float | None) -> None:
    """Where other programs have the machine's cores, steps say little of what they take alone.
    load: processes a core.
    """
    if load is not None and load > BUSY_LOAD:
        line = (
            f"note: this machine is busy with other programs ({load:.1f} processes a core in the"
            " last minute): steps and the time left are longer than alone"
        )
        out.print(line, style="yellow", markup=False, soft_wrap=True)


def channel_note(out: Console, plan: Plan) -> None:
    """Which operations of the recipe make no sense for the data's channels, and are not drawn."""
    for line in channel_notes(plan.recipe.augment, plan.profile.channels):
        out.print(line, style="yellow", markup=False)


def precision_note(out: Console, plan: Plan, precision: str) -> None:
    """Where a run of the source's own data is in another precision than the source's."""
    scores = [score for score in plan.recipe.published if score.precision]
    if plan.profile.adapt is not None or precision in {score.precision for score in scores}:
        return
    if scores:
        known = scores[0]
        source = f"at the source {known.precision} ({known.top1_pct} %)"
        line = f"note: precision is {precision}, {source}"
        out.print(line, style="yellow", markup=False)


def scaling_note(out: Console, plan: Plan) -> None:
    """Where the batch is another and the learning rate is not: what the recipe's own rule would
    make of it, and what measures one.
    """
    found = rates_by_rule(plan.recipe, plan.deviations)
    if found is None:
        return
    peak, rule = plan.recipe.lr.peak, plan.recipe.lr.scaling
    line = (
        f"note: lr.peak stays {peak:g}, which is for {images_of_rate(plan.deviations):,} images a"
        f" step, here {plan.recipe.batch.images:,}: the recipe has no rule for another batch;"
        f" {command('lr-find')} with the same words measures one"
    )
    if rule is not None:
        items = " ".join(f"{path}={_written(value)}" for path, value in found.items())
        line = (
            f"note: lr.peak stays {peak:g}; the recipe's {rule} rule would make it"
            f' {found["lr.peak"]:.4g}: set="{items}"'
        )
    out.print(line, style="yellow", markup=False, soft_wrap=True)


def _written(value: object) -> str:
    """A value as set= reads it."""
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, separators=(",", ":"))
