"""What a profile changes in a recipe, by the recipe's own rules: small images and small sets cannot
take an ImageNet recipe as it stands. Every change is a deviation of the run: recorded, printed,
stored in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.recipe.overrides import Deviation
from trainer.recipe.profiles import PROFILES, Adapt, Profile
from trainer.recipe.schema import Recipe
from trainer.recipe.tree import changed

_LEAST_GROWTH_PX = (
    32  # a model of stride 32 without padding, such as ConvNeXt, takes nothing smaller
)


def adaptation(recipe: Recipe, profile: Profile, from_weights: bool = False) -> dict[str, Any]:
    """The overrides, by dotted path, that fit a recipe to a profile; empty where the profile adapts
    nothing.

    Lengths that a recipe gives in epochs keep their share of the run, learning rates follow the
    recipe's own scaling rule, and an average keeps its share of the run's steps. A recipe that is
    adapted already is left as it is.

    from_weights: the run starts from trained weights. A profile's epochs, which are those of
    training from scratch, then make no run longer than its recipe has it.
    """
    adapt = profile.adapt
    if adapt is None:
        return {}
    if from_weights and adapt.epochs is not None and adapt.epochs > recipe.epochs:
        adapt = adapt.model_copy(update={"epochs": None})
    changes: dict[str, Any] = {}
    _fit_images(changes, recipe, adapt)
    _fit_growth(changes, recipe, adapt)
    _fit_batch(changes, recipe, adapt)
    _fit_schedule(changes, recipe, adapt)
    _fit_precise_norm(changes, recipe, profile.num_train)
    _fit_lengths(changes, recipe, adapt, profile.num_train)
    _fit_average(changes, recipe, adapt, profile.num_train)
    return changes


def _fit_images(changes: dict[str, Any], recipe: Recipe, adapt: Adapt) -> None:
    for key in ("train_px", "test_px", "test_crop_share"):
        if getattr(adapt, key) is not None:
            changes[f"image.{key}"] = getattr(adapt, key)
    if adapt.crop_area is not None:
        for part in recipe.augment:
            changes |= changed(f"augment.{part.name}", part, part.with_least_area(adapt.crop_area))


def _fit_growth(changes: dict[str, Any], recipe: Recipe, adapt: Adapt) -> None:
    """Images grow over the same share of the run, from the same share of the final size, in about
    as many sizes.

    Below 32 px many models have nothing left: where that leaves no smaller size to start from,
    nothing grows.
    """
    growth = recipe.image.growth
    if growth is None:
        return
    if adapt.train_px not in (None, recipe.image.train_px):
        ratio = adapt.train_px / recipe.image.train_px
        most_px = max(1, int(growth.multiple_px * ratio))
        multiple_px = next(px for px in range(most_px, 0, -1) if adapt.train_px % px == 0)
        from_px = multiple_px * max(
            -(-_LEAST_GROWTH_PX // multiple_px), round(growth.from_px * ratio / multiple_px)
        )
        if from_px >= adapt.train_px:
            changes["image.growth"] = None
            return
        changes |= {"image.growth.from_px": from_px, "image.growth.multiple_px": multiple_px}
    if adapt.epochs is not None:
        changes |= changed("image.growth", growth, growth.scaled_to(adapt.epochs, recipe.epochs))


def _fit_batch(changes: dict[str, Any], recipe: Recipe, adapt: Adapt) -> None:
    """The batch of the profile, at the rate that the recipe's own rule gives it.

    Where the rate is in proportion to the batch, so is a decay that does not follow the rate by
    itself (see Optimizer.decay_follows_rate). A recipe without a rule, such as mosaic-mild, keeps
    both as they are. A mixing unit keeps its images, or has the most that divide the batch.
    """
    if adapt.batch_images is None:
        return
    changes["batch.images"] = adapt.batch_images
    changes["batch.norm_images"] = adapt.norm_images or adapt.batch_images
    if recipe.mix and recipe.mix.images:
        fitting = (n for n in range(recipe.mix.images, 1, -1) if adapt.batch_images % n == 0)
        changes["mix.images"] = next(fitting, None)
    changes |= _scaled_rates(recipe, _rate_ratio(recipe, adapt))


def _scaled_rates(recipe: Recipe, ratio: float) -> dict[str, object]:
    """What follows a rate that is `ratio` times as high, but for the schedule."""
    if ratio == 1:
        return {}
    changes: dict[str, object] = {"lr.peak": recipe.lr.peak * ratio}
    if recipe.lr.warmup_from:
        changes["lr.warmup_from"] = recipe.lr.warmup_from * ratio
    if recipe.lr.scaling == "linear":
        changes |= changed("optimizer", recipe.optimizer, recipe.optimizer.scaled_by(ratio))
    return changes


def rates_by_rule(recipe: Recipe, deviations: Sequence[Deviation]) -> dict[str, object] | None:
    """The overrides that the recipe's own rule would add to one of batch.images; empty where it has
    no rule, be the batch that of an override or of a profile. They are not made: an override is
    what was written and nothing else.

    None where the batch is the recipe's or the rate follows it, or a peak was written beside it.
    """
    given = {change.path: change for change in deviations if change.origin == "set"}
    batch = given.get("batch.images")
    if "lr.peak" in given:
        return None
    if recipe.lr.scaling is None:
        return None if images_of_rate(deviations) in (None, recipe.batch.images) else {}
    if batch is None:
        return None
    ratio = recipe.lr.scaled(batch.before, batch.after) / recipe.lr.peak
    schedule = recipe.lr.schedule
    changes = _scaled_rates(recipe, ratio)
    changes |= changed("lr.schedule", schedule, schedule.scaled_by(ratio)) if changes else {}
    return {path: value for path, value in changes.items() if path not in given}


def images_of_rate(deviations: Sequence[Deviation]) -> int | None:
    """Images per step that a recipe's own rate was made for; None where a run has the recipe's, and
    where a row says it as text.
    """
    changes = (c for c in deviations if c.path == "batch.images" and c.origin != "file")
    before = next((change.before for change in changes), None)
    return before if isinstance(before, int) else None


def _rate_ratio(recipe: Recipe, adapt: Adapt) -> float:
    """How much higher the rate is under the profile's batch, by the recipe's own rule."""
    if adapt.batch_images is None:
        return 1.0
    return recipe.lr.scaled(recipe.batch.images, adapt.batch_images) / recipe.lr.peak


def _fit_schedule(changes: dict[str, Any], recipe: Recipe, adapt: Adapt) -> None:
    before = after = recipe.lr.schedule
    if (ratio := _rate_ratio(recipe, adapt)) != 1:
        after = after.scaled_by(ratio)
    if adapt.epochs is not None:
        after = after.scaled_to(adapt.epochs, recipe.epochs)
    changes |= changed("lr.schedule", before, after)


def _fit_precise_norm(changes: dict[str, Any], recipe: Recipe, num_train: int) -> None:
    """As many images as the recipe says, or the most in whole micro-batches of an epoch's full
    steps; off where none fit.
    """
    if recipe.precise_norm is None:
        return
    batch_images = changes.get("batch.images", recipe.batch.images)
    norm_images = changes.get("batch.norm_images", recipe.batch.norm_images)
    most_images = min(recipe.precise_norm.images, num_train // batch_images * batch_images)
    num_images = most_images // norm_images * norm_images
    if num_images < 2:
        changes["precise_norm"] = None
    elif num_images != recipe.precise_norm.images:
        changes["precise_norm.images"] = num_images


def _fit_lengths(changes: dict[str, Any], recipe: Recipe, adapt: Adapt, num_train: int) -> None:
    if recipe.lr.warmup_steps:
        changes |= _warmup_steps(recipe.lr.warmup_steps, recipe, adapt, num_train)
    if adapt.epochs is None:
        return
    changes["epochs"] = adapt.epochs
    ending = [(f"augment.{part.name}", part) for part in recipe.augment]
    for path, part in (*ending, *([("mix", recipe.mix)] if recipe.mix else ())):
        changes |= changed(path, part, part.scaled_to(adapt.epochs, recipe.epochs))
    if recipe.lr.cooldown_epochs:
        share = recipe.lr.cooldown_epochs / recipe.epochs
        changes["lr.cooldown_epochs"] = round(share * adapt.epochs) or None
    if recipe.lr.warmup_epochs:
        changes |= _warmup_epochs(
            recipe.lr.warmup_epochs / recipe.epochs, adapt.epochs, recipe, adapt
        )


def _warmup_steps(before: int, recipe: Recipe, adapt: Adapt, num_train: int) -> dict[str, Any]:
    """The same share of the run's steps, at least one; none where the profile says so."""
    if adapt.warmup_epochs == 0:
        return recipe.lr.without_warmup("warmup_steps")
    recipe_steps, run_steps = _num_steps(recipe, adapt, num_train)
    if recipe_steps == run_steps:
        return {}
    return {"lr.warmup_steps": max(1, round(before * run_steps / recipe_steps))}


def _num_steps(recipe: Recipe, adapt: Adapt, num_train: int) -> tuple[int, int]:
    """Optimizer steps of the recipe's own run, on ImageNet-1k where it names no other data, and of
    the adapted one.
    """
    epochs, batch_images = adapt.epochs or recipe.epochs, adapt.batch_images or recipe.batch.images
    own = PROFILES.get(recipe.adapted_to or "", PROFILES["imagenet-1k"])
    recipe_steps = recipe.epochs * max(1, own.num_train // recipe.batch.images)
    return recipe_steps, epochs * max(1, num_train // batch_images)


def _warmup_epochs(share: float, epochs: int, recipe: Recipe, adapt: Adapt) -> dict[str, Any]:
    """The profile's own number, 0 for none; else the recipe's share of the run, at least one
    epoch.
    """
    own = adapt.warmup_epochs
    warmup_epochs = max(1, round(share * epochs)) if own is None else own
    if warmup_epochs:
        return {"lr.warmup_epochs": warmup_epochs}
    return recipe.lr.without_warmup("warmup_epochs")


def _fit_average(changes: dict[str, Any], recipe: Recipe, adapt: Adapt, num_train: int) -> None:
    average = recipe.average
    epochs, batch_images = adapt.epochs or recipe.epochs, adapt.batch_images or recipe.batch.images
    if average is None or (recipe.batch.images, recipe.epochs) == (batch_images, epochs):
        return
    batches, lengths = (recipe.batch.images, batch_images), (recipe.epochs, epochs)
    changes |= changed(
        "average", average, average.scaled(_num_steps(recipe, adapt, num_train), batches, lengths)
    )
