"""What a profile changes in a page, by the page's own rules: small images and small sets cannot take an ImageNet page
as it stands. Every change is a deviation of the run: recorded, printed, stored in its row."""

from __future__ import annotations

from trainer.recipe.profiles import PROFILES, Profile
from trainer.recipe.schema import Recipe

_LEAST_GROWTH_PX = (
    32  # a model of stride 32 without padding, such as ConvNeXt, takes nothing smaller
)


def adaptation(recipe: Recipe, profile: Profile) -> dict[str, object]:
    """The overrides, by dotted path, that fit a page to a profile; empty where the profile adapts nothing.

    Lengths that a page gives in epochs keep their share of the run, learning rates follow the page's own scaling rule,
    and an average keeps its share of the run's steps. A page that is adapted already is left as it is.
    """
    adapt = profile.adapt
    if adapt is None:
        return {}
    changes: dict[str, object] = {}
    _fit_images(changes, recipe, adapt)
    _fit_growth(changes, recipe, adapt)
    _fit_batch(changes, recipe, adapt)
    _fit_precise_norm(changes, recipe, profile)
    _fit_lengths(changes, recipe, profile)
    _fit_average(changes, recipe, profile)
    return changes


def _fit_images(changes, recipe: Recipe, adapt) -> None:
    for key in ("train_px", "test_px", "test_crop_share"):
        if getattr(adapt, key) is not None:
            changes[f"image.{key}"] = getattr(adapt, key)
    crops = [part.name for part in recipe.augment if part.name == "random_resized_crop"]
    if adapt.crop_area is not None and crops:
        changes["augment.random_resized_crop.area"] = (adapt.crop_area, 1.0)


def _fit_growth(changes, recipe: Recipe, adapt) -> None:
    """Images grow over the same share of the run, from the same share of the final size, in about as many sizes.

    Below 32 px many models have nothing left: where that leaves no smaller size to start from, nothing grows.
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
        for key in ("from_epoch", "to_epoch"):
            changes[f"image.growth.{key}"] = _shared(getattr(growth, key), recipe, adapt)


def _fit_batch(changes, recipe: Recipe, adapt) -> None:
    """The batch of the profile, at the rate that the page's own rule gives it.

    The decay of decoupled_sgd is a share lost in a step, whatever the rate: where the rate is in proportion to the batch
    the decay is so too, and an image takes as much of a weight as before. A page without a rule, such as mosaic-mild,
    keeps both as they are. Every other optimizer multiplies its decay with the rate, which has changed already.
    """
    if adapt.batch_images is None:
        return
    changes["batch.images"] = adapt.batch_images
    changes["batch.norm_images"] = adapt.norm_images or adapt.batch_images
    ratio = recipe.lr.scaled(recipe.batch.images, adapt.batch_images) / recipe.lr.peak
    if ratio == 1:
        return
    changes["lr.peak"] = recipe.lr.peak * ratio
    if recipe.lr.warmup_from:
        changes["lr.warmup_from"] = recipe.lr.warmup_from * ratio
    if getattr(recipe.lr.schedule, "end", None):
        changes["lr.schedule.end"] = recipe.lr.schedule.end * ratio
    if (
        recipe.lr.scaling == "linear"
        and recipe.optimizer.name == "decoupled_sgd"
        and recipe.optimizer.weight_decay
    ):
        changes["optimizer.weight_decay"] = recipe.optimizer.weight_decay * ratio


def _fit_precise_norm(changes, recipe: Recipe, profile: Profile) -> None:
    """As many images as the page says, or the most in whole micro-batches of an epoch's full steps; off where none fit."""
    if recipe.precise_norm is None:
        return
    batch_images = changes.get("batch.images", recipe.batch.images)
    norm_images = changes.get("batch.norm_images", recipe.batch.norm_images)
    most_images = min(recipe.precise_norm.images, profile.num_train // batch_images * batch_images)
    num_images = most_images // norm_images * norm_images
    if num_images < 2:
        changes["precise_norm"] = None
    elif num_images != recipe.precise_norm.images:
        changes["precise_norm.images"] = num_images


def _fit_lengths(changes, recipe: Recipe, profile: Profile) -> None:
    adapt, schedule = profile.adapt, recipe.lr.schedule
    if recipe.lr.warmup_steps:
        _fit_warmup_steps(changes, recipe, profile)
    if adapt.epochs is None:
        return
    changes["epochs"] = adapt.epochs
    if recipe.lr.warmup_epochs:
        _fit_warmup(changes, recipe, adapt)
    for key in ("every_epochs", "decay_epochs"):
        if getattr(schedule, key, None) is not None:
            changes[f"lr.schedule.{key}"] = max(
                1, round(_shared(getattr(schedule, key), recipe, adapt))
            )
    if getattr(schedule, "points", None) is not None:
        changes["lr.schedule.points"] = tuple(
            (_shared(epoch, recipe, adapt), share) for epoch, share in schedule.points
        )
    if getattr(schedule, "at_epochs", None) is not None:
        _fit_milestones(changes, recipe, adapt)


def _shared(epochs: float, recipe: Recipe, adapt) -> float:
    """So many epochs of the page's run, as the same share of the adapted one."""
    return round(epochs * adapt.epochs / recipe.epochs, 6)


def _fit_milestones(changes, recipe: Recipe, adapt) -> None:
    """Whole epochs, each once and inside the run: those that fall together in a short run become one."""
    epochs = (round(_shared(epoch, recipe, adapt)) for epoch in recipe.lr.schedule.at_epochs)
    kept = tuple(sorted({epoch for epoch in epochs if 1 <= epoch < adapt.epochs}))
    if kept:
        changes["lr.schedule.at_epochs"] = kept
    else:
        changes["lr.schedule"] = {"name": "constant"}


def _fit_warmup_steps(changes, recipe: Recipe, profile: Profile) -> None:
    """The same share of the run's steps, at least one; none where the profile says so."""
    if profile.adapt.warmup_epochs == 0:
        changes["lr.warmup_steps"] = changes["lr.warmup_from"] = None
        return
    page_steps, run_steps = _num_steps(recipe, profile)
    if page_steps != run_steps:
        changes["lr.warmup_steps"] = max(1, round(recipe.lr.warmup_steps * run_steps / page_steps))


def _num_steps(recipe: Recipe, profile: Profile) -> tuple[int, int]:
    """Optimizer steps of the page's own run, which is the one on ImageNet-1k, and of the adapted one."""
    adapt = profile.adapt
    epochs, batch_images = adapt.epochs or recipe.epochs, adapt.batch_images or recipe.batch.images
    page_steps = recipe.epochs * max(1, PROFILES["imagenet-1k"].num_train // recipe.batch.images)
    return page_steps, epochs * max(1, profile.num_train // batch_images)


def _fit_warmup(changes, recipe: Recipe, adapt) -> None:
    """The profile's own number, 0 for none; else the page's share of the run, at least one epoch."""
    share = recipe.lr.warmup_epochs / recipe.epochs
    warmup_epochs = (
        max(1, round(share * adapt.epochs)) if adapt.warmup_epochs is None else adapt.warmup_epochs
    )
    changes["lr.warmup_epochs"] = warmup_epochs or None
    if not warmup_epochs:
        changes["lr.warmup_from"] = None


def _fit_average(changes, recipe: Recipe, profile: Profile) -> None:
    """An average over the last tenth of a long run stays an average over the last tenth of a short one.

    What an update takes in grows as updates become fewer, up to a half.
    """
    average, adapt = recipe.average, profile.adapt
    epochs, batch_images = adapt.epochs or recipe.epochs, adapt.batch_images or recipe.batch.images
    if average is None or (recipe.batch.images, recipe.epochs) == (batch_images, epochs):
        return
    page_steps, run_steps = _num_steps(recipe, profile)
    every_steps = max(1, round(average.every_steps * run_steps / page_steps))
    taken = 1 - average.decay
    if average.adjusted:
        taken *= recipe.batch.images * average.every_steps / recipe.epochs
    taken = min(0.5, taken * (page_steps / average.every_steps) / (run_steps / every_steps))
    if average.adjusted:
        taken /= batch_images * every_steps / epochs
    changes["average.decay"] = round(1 - taken, 6)
    if every_steps != average.every_steps:
        changes["average.every_steps"] = every_steps
