"""The facts of a plan as text: its batch, its model, its teacher, its learning rates."""

from __future__ import annotations

from rich.table import Table

from trainer.components.param_groups import param_groups
from trainer.models.build import gmacs, num_parameters
from trainer.models.freezing import frozen_names
from trainer.recipe.plan import Plan
from trainer.tasks.teacher import Teacher

_MOST_RATES = 10  # lines of learning rates
_MOST_SIDES = 4  # of growing images, on one line
_BARS = "▁▂▃▄▅▆▇█"


def batch_line(plan: Plan) -> str:
    """How a step's images are split over ranks and micro-batches."""
    batch, world, mix = plan.recipe.batch, plan.world_size, plan.recipe.mix
    assigned = plan.assignment(0, world)
    each = -(-plan.norm_samples(0) // assigned.num_parts)
    number = plan.num_micro_batches // assigned.num_groups * each
    images = -(-batch.images // (world * number))
    return (
        f"{batch.images} images per step = {world} rank{'s' * (world > 1)} x {number} "
        f"micro-batch{'es' * (number > 1)} x {images} images"
        + (f" x {plan.recipe.augment_splits} splits" if plan.recipe.augment_splits else "")
        + (
            f", {plan.recipe.images_together} shared by {assigned.num_parts} ranks"
            if assigned.num_parts > 1
            else ""
        )
        + (f", mixed {mix.images} at a time" if mix and mix.images else "")
    )


def model_facts(plan: Plan, model) -> str:
    """How large a model is, and what one image costs."""
    shown_px, _ = plan.recipe.of_task.evaluation_px(plan.recipe.image)
    cost = gmacs(model, plan.profile.channels, shown_px)
    freeze = plan.recipe.model.freeze if plan.recipe.model else None
    frozen = ""
    if freeze:
        weights, until = dict(model.named_parameters()), freeze.until_epochs
        number = sum(weights[name].numel() for name in frozen_names(model, freeze))
        frozen = f" ({number:,} frozen" + (f" until epoch {until:g})" if until else ")")
        if freeze.from_epochs:
            frozen = f" ({number:,} frozen from epoch {freeze.from_epochs:g} on)"
    return (
        f"{num_parameters(model):,} parameters{frozen}, {cost:.4g} G multiply-adds an image of"
        f" {shown_px} px"
    )


def teacher_facts(plan: Plan, teacher: Teacher) -> str:
    """Who teaches, by which file, and how."""
    distill = plan.recipe.distill
    assert distill is not None and distill.sha256 is not None
    return (
        f"{distill.teacher} of {distill.weights} (sha256 {distill.sha256[:12]}), {distill.name},"
        f" {distill.share:g} of the loss"
        + ("" if teacher.is_shown_alike else "; the images are normalized anew for it")
    )


def teacher_cost(plan: Plan, model, teacher: Teacher) -> str:
    """What its forward pass adds to a step, whose backward pass costs two forward ones."""
    sizes = plan.profile.channels, plan.recipe.image.train_px
    own, theirs = gmacs(model, *sizes), gmacs(teacher, *sizes)
    return (
        f"{theirs:.4g} G multiply-adds an image of {sizes[1]} px, {100 * theirs / (3 * own):.0f} %"
        " more for a step; none of it is in the model's numbers"
    )


def decay_line(plan: Plan, model) -> str:
    """On how many of a model's parameters the weight decay is, and what share of the learning rate
    its layers have, where they differ. Raises PlanError as `param_groups` does.
    """
    groups = param_groups(model, plan.recipe.optimizer)
    counts = {plan.recipe.optimizer.weight_decay: 0} | {g["weight_decay"]: 0 for g in groups}
    for group in groups:
        counts[group["weight_decay"]] += sum(weight.numel() for weight in group["params"])
    total = sum(counts.values())
    parts = [f"{decay:g} on {count:,}" for decay, count in counts.items() if decay and count]
    said = ", ".join(parts) or f"{plan.recipe.optimizer.weight_decay:g} on 0"
    line = f"{said} of {total:,} parameters"
    scales = sorted({group["lr_scale"] for group in groups})
    if scales != [1.0]:
        who = "weights" if plan.recipe.optimizer.own_rates else "the layers"
        line += f"; {who} have {scales[0]:.3g} to {scales[-1]:.3g} of the learning rate"
    return line


def growth_line(plan: Plan) -> str:
    """The side of the training images and, where they grow, the first step of each side."""
    sides = (
        [plan.train_px_at(step) for step in range(plan.num_steps)]
        if plan.recipe.image.growth
        else []
    )
    changes = [step for step in range(1, len(sides)) if sides[step] != sides[step - 1]]
    if not changes:
        return f"{plan.recipe.image.train_px} px"
    shown_steps = changes if len(changes) <= _MOST_SIDES else [*changes[:2], changes[-1]]
    parts = [
        f"{sides[step]} px from step {step:,} (epoch {step / plan.steps_per_epoch:.4g})"
        for step in shown_steps
    ]
    if len(changes) > _MOST_SIDES:
        parts.insert(2, f"… {len(changes) - 3} sizes …")
    return f"{sides[0]} px from step 0, {', '.join(parts)}"


def lr_per_epoch(plan: Plan) -> list[float]:
    """The learning rate of the first step of every epoch."""
    return [plan.lr_at(epoch * plan.steps_per_epoch) for epoch in range(plan.recipe.epochs)]


def lr_table(plan: Plan) -> Table:
    """The learning rate at the first step of an epoch: of all, or of ten spread over the run, the
    first after the warm-up and the first of a cooldown.
    """
    rates = lr_per_epoch(plan)
    number = min(_MOST_RATES, len(rates))
    spread = {round(i * (len(rates) - 1) / max(1, number - 1)) for i in range(number)}
    after_warmup = plan.num_warmup_steps // plan.steps_per_epoch
    cooldown = plan.recipe.lr.scheduled_epochs(len(rates))
    shown = sorted(spread | ({after_warmup, cooldown} & set(range(len(rates)))))
    table = Table("epoch", "learning rate", box=None, pad_edge=False)
    for epoch in shown:
        table.add_row(str(epoch), f"{rates[epoch]:.3e}")
    return table


def sparkline(values: list[float], width: int = 60) -> str:
    """Values as a line of blocks, at most `width` wide."""
    top = max(values) or 1.0
    picked = [
        values[round(i * (len(values) - 1) / (min(width, len(values)) - 1 or 1))]
        for i in range(min(width, len(values)))
    ]
    return "".join(
        _BARS[min(len(_BARS) - 1, int(value / top * (len(_BARS) - 1) + 0.5))] for value in picked
    )
