"""Which norms of a model keep statistics of batches, and what these ask of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from trainer.base.errors import PlanError
from trainer.models.edit.layer_kinds import FROZEN_NORMS, AnyBatchNorm, RunningNorm, can_join
from trainer.models.edit.replacement import is_norm
from trainer.models.parts.norm_layers import StepNorm
from trainer.models.sizes import TRIED_PX, refusal, train_sizes

if TYPE_CHECKING:
    from trainer.recipe.plan import Plan


def check_sample(plan: Plan, model: nn.Module) -> None:
    """Reject batch statistics of a single value, as of one image with a 1x1 map: torch raises at
    such a step. Reject a last step of one image where all others have larger samples.
    """
    batch, rest = plan.recipe.batch, plan.window_images(plan.steps_per_epoch - 1)
    if rest == 1 and batch.norm_images > 1:
        named = (
            name for name, norm in model.named_modules() if is_norm(norm) and has_statistics(norm)
        )
        name = next(named, None)
        if name is not None:
            raise PlanError(
                f"the last step of an epoch would hold one image ({plan.profile.num_train} images,"
                f" {batch.images} per step), and {name} of {plan.model} takes batch statistics",
                "use batch.drop_last=true",
                path=("batch", "images"),
            )
    steps = (0, plan.steps_per_epoch - 1)  # any full step, and the last, which may be smaller
    least_images = min(
        plan.window_images(step) // (plan.micro_batches(step) * plan.norm_samples(step))
        for step in steps
    )
    if least_images * (plan.recipe.augment_splits or 1) > 1:
        return
    channels = plan.profile.channels
    for image_px, place in train_sizes(plan).items():
        name = _single_value(model, channels, image_px)
        if name is not None:
            larger = (
                px
                for px in TRIED_PX
                if px > image_px and _single_value(model, channels, px) is None
            )
            fitting_px = next(larger, None)
            remedy = f', or larger images (set="{place}={fitting_px}")' if fitting_px else ""
            raise PlanError(
                f"batch.norm_images {plan.recipe.batch.norm_images}: {name} gets a 1x1 feature map "
                f"from images of {image_px} px ({place}), so its batch statistics would be of one "
                f"value; use batch.norm_images of 2 or more{remedy}"
            )


def _single_value(model: nn.Module, channels: int, image_px: int) -> str | None:
    """The first norm with batch statistics that gets one value per channel from one image of a
    size, or None.
    """
    found: list[str] = []

    def measuring(name: str):
        return lambda norm, given: (
            found.append(name) if given[0].numel() == norm.num_features else None
        )

    norms = {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, AnyBatchNorm) and norm.training
    }
    handles = [norm.register_forward_pre_hook(measuring(name)) for name, norm in norms.items()]
    try:
        refusal(model, channels, image_px)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def check_joined(plan: Plan, model: nn.Module) -> None:
    """Reject ranks that would share a statistics sample of norms that cannot be joined."""
    num_parts, batch = plan.assignment(0, plan.world_size).num_parts, plan.recipe.batch
    norms = norms_of_micro_batch(model)
    if num_parts == 1 or not norms:
        return
    number = plan.num_micro_batches
    fitting = [n for n in range(1, number + 1) if number % n == 0]
    ranks = f"use {', '.join(map(str, fitting))} rank{'s' * (number > 1)}"
    what = f"{num_parts} of the {plan.world_size} ranks would share each statistics sample"
    for name, norm in norms.items():
        if not can_join(norm):
            raise PlanError(f"{what}, which {name} ({type(norm).__name__}) cannot join", ranks)
    if plan.recipe.images_together > batch.norm_images:
        raise PlanError(
            f"{what} of {batch.norm_images} images, and a mixing unit spans several of them",
            f'{ranks}, or set="mix.images={batch.norm_images}"',
            path=("mix", "images"),
        )


def check_frozen(plan: Plan, model: nn.Module) -> None:
    """Reject norms whose statistics are made outside their passes: frozen ones keep theirs."""
    made = "precise_norm" if plan.recipe.precise_norm is not None else ""
    if any(isinstance(module, StepNorm) for module in model.modules()):
        made = "a norm with estimated statistics"
    if made:
        raise PlanError(
            f"model.freeze: not possible with {made}, which moves the statistics of frozen norms",
            "leave one of them out",
            path=("model", "freeze"),
        )


def check_precise_norm(plan: Plan, model: nn.Module) -> None:
    """Reject a precise_norm that cannot be computed.

    Raises PlanError for a model whose norms keep no running batch statistics, for images that make
    no whole micro-batches, and for more images than the full steps of an epoch have.
    """
    section = plan.recipe.precise_norm
    if section is None:
        return
    if not running_norms(model):
        raise PlanError(
            f"precise_norm: no norm of {plan.model} keeps running batch statistics; "
            "leave precise_norm out"
        )
    batch = plan.recipe.batch
    whole, rest = divmod(section.images, batch.norm_images)
    if rest:
        near = " or ".join(str(n * batch.norm_images) for n in (whole, whole + 1) if n)
        raise PlanError(
            f"precise_norm.images {section.images} is not a multiple of "
            f"batch.norm_images {batch.norm_images}; use {near}"
        )
    num_images = plan.profile.num_train // batch.images * batch.images
    if section.images > num_images:
        remedy = (
            f'use set="precise_norm.images={num_images}"'
            if num_images
            else "leave precise_norm out"
        )
        raise PlanError(
            f"precise_norm.images {section.images} is more than the {num_images} images in the "
            f"full steps of an epoch; {remedy}"
        )


def has_statistics(norm: nn.Module) -> bool:
    """Are there running statistics that training moves? timm's frozen norms have them as
    constants.
    """
    return getattr(norm, "running_var", None) is not None and not FROZEN_NORMS.has(norm)


def norms_of_micro_batch(model: nn.Module) -> dict[str, nn.Module]:
    """The norms, by name, that normalize by the statistics of a micro-batch: for them its size is
    science.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if is_norm(module) and has_statistics(module)
    }
    return {name: module for name, module in named.items() if not isinstance(module, StepNorm)}


def running_norms(model: nn.Module) -> list[RunningNorm]:
    """Norms that keep running statistics of batches."""
    return [
        module
        for module in model.modules()
        if isinstance(module, RunningNorm) and module.track_running_stats
    ]
