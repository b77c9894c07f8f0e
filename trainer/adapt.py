"""What a profile changes in a page, by the page's own rules: small images and small sets cannot take an ImageNet page
as it stands. Every change is a deviation of the run: recorded, printed, stored in its row."""

from __future__ import annotations

from trainer.profiles import Profile
from trainer.recipe import Recipe

_IMAGENET_IMAGES = 1_281_167


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
    _fit_batch(changes, recipe, adapt)
    _fit_lengths(changes, recipe, adapt)
    _fit_average(changes, recipe, profile)
    return changes


def _fit_images(changes, recipe: Recipe, adapt) -> None:
    for key in ("train_px", "test_px", "test_crop_share"):
        if getattr(adapt, key) is not None:
            changes[f"image.{key}"] = getattr(adapt, key)
    crops = [part.name for part in recipe.augment if part.name == "random_resized_crop"]
    if adapt.crop_area is not None and crops:
        changes["augment.random_resized_crop.area"] = (adapt.crop_area, 1.0)


def _fit_batch(changes, recipe: Recipe, adapt) -> None:
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


def _fit_lengths(changes, recipe: Recipe, adapt) -> None:
    if adapt.epochs is None:
        return
    changes["epochs"] = adapt.epochs
    if recipe.lr.warmup_epochs:
        _fit_warmup(changes, recipe, adapt)
    every_epochs = getattr(recipe.lr.schedule, "every_epochs", None)
    if every_epochs is not None:
        changes["lr.schedule.every_epochs"] = max(1, round(every_epochs * adapt.epochs / recipe.epochs))


def _fit_warmup(changes, recipe: Recipe, adapt) -> None:
    """The profile's own number, 0 for none; else the page's share of the run, at least one epoch."""
    share = recipe.lr.warmup_epochs / recipe.epochs
    warmup_epochs = max(1, round(share * adapt.epochs)) if adapt.warmup_epochs is None else adapt.warmup_epochs
    changes["lr.warmup_epochs"] = warmup_epochs or None
    if not warmup_epochs:
        changes["lr.warmup_from"] = None


def _fit_average(changes, recipe: Recipe, profile: Profile) -> None:
    """An average over the last tenth of a long run stays an average over the last tenth of a short one.

    The page's own run is the one on ImageNet-1k. What an update takes in grows as updates become fewer, up to a half.
    """
    average, adapt = recipe.average, profile.adapt
    epochs, batch_images = adapt.epochs or recipe.epochs, adapt.batch_images or recipe.batch.images
    if average is None or (recipe.batch.images, recipe.epochs) == (batch_images, epochs):
        return
    page_steps = recipe.epochs * (_IMAGENET_IMAGES // recipe.batch.images)
    run_steps = epochs * max(1, profile.num_train // batch_images)
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
